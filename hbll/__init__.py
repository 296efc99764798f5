"""What users of a server import, `hbll.client`, and the command line, `hbll.cli`: neither costs anything of the other."""
