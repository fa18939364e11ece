# AdamW everywhere, QK-Norm whose gains stay at one: does QK-Norm act by its gains?
arm = "adamw_qk_frozen"
optimizer = "adamw"
qk_norm = True
qk_gain = False
