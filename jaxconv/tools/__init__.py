"""What users do with a program: explain it, measure its convolutions, keep its memory."""
