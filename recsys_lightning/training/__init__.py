"""Lightning glue: what is computed a step, what is logged, what is optimised. No model code here."""
