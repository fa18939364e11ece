# Muon on hidden matrices, AdamW on the rest, no QK-Norm.
arm = "muon"
optimizer = "muon"
qk_norm = False
