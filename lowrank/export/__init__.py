"""What a trained model becomes for other programs: a PEFT folder, a plain transformers folder."""
