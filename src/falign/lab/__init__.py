"""The laboratory: data, models, training, records, pictures."""
