"""`python -m cloud_server` is `cloud-server`."""

from cloud_server.cli import main

if __name__ == "__main__":
    main(prog_name="cloud-server")
