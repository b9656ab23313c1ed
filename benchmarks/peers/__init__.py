"""The device beside what people would otherwise install: models, contenders, and their measure."""
