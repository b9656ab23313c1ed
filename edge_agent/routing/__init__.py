"""Where a prompt is drawn: text encoder, quality predictor, superiority and threshold."""
