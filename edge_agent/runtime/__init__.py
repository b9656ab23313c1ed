"""The only importer of onnxruntime and OpenVINO: providers, sessions, memory, cancellation."""
