"""Writes the stubs of `open_inference.proto`: `python -m service.oip.rpc.generate`. Needs the extra `dev`."""

from __future__ import annotations

from pathlib import Path

STUBS = Path(__file__).with_name("stubs")

_PROTO = "open_inference"
_SHARED_POOL, _OWN_POOL = "_descriptor_pool.Default()", "_descriptor_pool.DescriptorPool()"


def generate(folder: Path) -> None:
    """Write the stubs into `folder`.

    Their messages get a descriptor pool of their own. In the one that all of a process share by default, those of
    tritonclient or KServe, of the same names and other files, would be refused, or they would refuse ours.

    Raises:
        RuntimeError: the proto has an error, which is on stderr, or the compiler's output is not as expected.
    """
    from grpc_tools import protoc

    status = protoc.main(["", f"-I{STUBS}", f"--python_out={folder}", f"--pyi_out={folder}", f"{_PROTO}.proto"])
    if status:
        raise RuntimeError(f"protoc ended with status {status}")
    module = folder / f"{_PROTO}_pb2.py"
    code = module.read_text(encoding="utf-8")
    if code.count(_SHARED_POOL) != 1:
        raise RuntimeError(f"{module}: expected {_SHARED_POOL} once, got it {code.count(_SHARED_POOL)} times")
    module.write_text(code.replace(_SHARED_POOL, _OWN_POOL), encoding="utf-8")


if __name__ == "__main__":
    generate(STUBS)
