"""The only importer of onnxruntime: sessions, threads, cancellation, error mapping."""
