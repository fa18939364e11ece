# AdamW everywhere, QK-Norm whose gains stay at one: is what QK-Norm does to keys done by its gains?
arm = "adamw_qk_frozen"
optimizer = "adamw"
qk_norm = True
qk_gain = False
