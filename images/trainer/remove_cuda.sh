#!/bin/sh
# Removes from one site-packages folder what torch 2.8 loads only where it finds a GPU. Run by images/trainer/Dockerfile
# with CUDA=remove; its last lines prove that training on the CPU still works, and fail the build when it does not.
#
# The rest of the CUDA libraries must stay: libtorch_cuda.so is linked against them and the loader wants them at import.
# Gone: cuDNN's implementations behind its small front library, cuSOLVER and torch's linear algebra on it (loaded at the
# first call), nvrtc's second copy, the compiler for GPU kernels (triton), static libraries and CUDA's headers.
set -eu
site=$1
before=$(du -sm "$site" | cut -f1)
rm -rf "$site"/triton "$site"/nvidia/cusolver "$site"/nvidia/*/include
rm -f "$site"/nvidia/cudnn/lib/libcudnn_*.so.* "$site"/nvidia/cuda_nvrtc/lib/*.alt.so.* "$site"/torch/lib/libtorch_cuda_linalg.so
find "$site"/nvidia -name '*.a' -delete
echo "remove_cuda: $before MB before, $(du -sm "$site" | cut -f1) MB after"
HOME=/tmp PYTHONDONTWRITEBYTECODE=1 "$site"/../../../bin/python - <<'PYTHON'
import peft
import torch
import transformers

config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
)
model = peft.get_peft_model(transformers.LlamaForCausalLM(config), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
tokens = torch.arange(1, 17).reshape(2, 8)
losses = []
for _ in range(4):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
torch.linalg.qr(torch.eye(4))
if not losses[-1] < losses[0]:
    raise SystemExit(f"remove_cuda: four training steps did not lower the loss: {losses}")
print(f"remove_cuda: trained on the CPU, loss {losses[0]:.4f} to {losses[-1]:.4f}")
PYTHON
