from __future__ import annotations

from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from fastapi import FastAPI

from service.listener import BadCertificate, server_config
from service.metrics import Metrics
from service.settings import Settings


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_an_encrypted_key_needs_its_password_and_nobody_is_asked_for_it(tmp_path: Path, form: PrivateFormat) -> None:
    certificate, chain, key = trustme.CA().issue_cert("127.0.0.1"), tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(b"".join(pem.bytes() for pem in certificate.cert_chain_pems))
    plain = load_pem_private_key(certificate.private_key_pem.bytes(), None)
    key.write_bytes(plain.private_bytes(Encoding.PEM, form, BestAvailableEncryption(b"right")))
    app = FastAPI()
    app.state.metrics = Metrics()
    files = {"tls_cert": chain, "tls_key": key}
    assert server_config(app, Settings(**files, tls_key_password="right")).ssl is not None
    with pytest.raises(BadCertificate, match=r"key\.pem is encrypted: expected its password by tls_key_password"):
        server_config(app, Settings(**files))
    with pytest.raises(BadCertificate, match="the key's password if it has one"):
        server_config(app, Settings(**files, tls_key_password="wrong"))
