# AdamW everywhere, with QK-Norm.
arm = "adamw_qk"
optimizer = "adamw"
qk_norm = True
