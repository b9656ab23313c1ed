"""The way to the cloud. `edge_agent.cloud.client` is the only importer of grpc on the device."""
