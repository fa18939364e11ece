# AdamW everywhere, no QK-Norm: the baseline.
arm = "adamw"
optimizer = "adamw"
qk_norm = False
