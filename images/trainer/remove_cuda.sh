#!/bin/sh
# Removes from one site-packages folder what torch 2.8 and bitsandbytes 0.50 load only where they find a GPU. Run by
# images/trainer/Dockerfile with CUDA=remove; its last lines prove that training on the CPU still works, with an adapter
# on a plain, an int8 and an nf4 base, and fail the build when it does not.
#
# The rest of the CUDA libraries must stay: libtorch_cuda.so is linked against them and the loader wants them at import.
# Gone: cuDNN's implementations behind its small front library, cuSOLVER and torch's linear algebra on it (loaded at the
# first call), nvrtc's second copy, the compiler for GPU kernels (triton), static libraries and CUDA's headers; of
# bitsandbytes' libraries, one for each version of each vendor's, all but the CPU's.
set -eu
site=$1
before=$(du -sm "$site" | cut -f1)
rm -rf "$site"/triton "$site"/nvidia/cusolver "$site"/nvidia/*/include
rm -f "$site"/nvidia/cudnn/lib/libcudnn_*.so.* "$site"/nvidia/cuda_nvrtc/lib/*.alt.so.* "$site"/torch/lib/libtorch_cuda_linalg.so
rm -f "$site"/bitsandbytes/libbitsandbytes_cuda*.so "$site"/bitsandbytes/libbitsandbytes_rocm*.so "$site"/bitsandbytes/libbitsandbytes_xpu*.so
find "$site"/nvidia -name '*.a' -delete
echo "remove_cuda: $before MB before, $(du -sm "$site" | cut -f1) MB after"
HOME=/tmp PYTHONDONTWRITEBYTECODE=1 "$site"/../../../bin/python - <<'PYTHON'
import tempfile

import peft
import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
)
tokens = torch.arange(1, 17).reshape(2, 8)
bases = {
    "a plain": None,
    "an int8": BitsAndBytesConfig(load_in_8bit=True),
    "an nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}
with tempfile.TemporaryDirectory() as folder:
    LlamaForCausalLM(config).save_pretrained(folder)
    for base, quantization in bases.items():
        loaded = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantization)
        model = peft.get_peft_model(loaded, peft.LoraConfig(target_modules=["q_proj", "v_proj"])).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        losses = []
        for _ in range(4):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        if not losses[-1] < losses[0]:
            raise SystemExit(f"remove_cuda: four training steps on {base} base did not lower the loss: {losses}")
        print(f"remove_cuda: trained on {base} base on the CPU, loss {losses[0]:.4f} to {losses[-1]:.4f}")
torch.linalg.qr(torch.eye(4))
PYTHON
