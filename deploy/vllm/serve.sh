#!/bin/sh
# mistralai/Mistral-7B-Instruct-v0.3 by vLLM 0.33.0, on a machine that has it: pip install vllm==0.33.0
# 7B v0.3 or 7B Instruct v0.3, 7,248.0 M parameters, window none: 14.5 GB of weights in bfloat16, 4.3
# GB of keys and values for a sequence of 32768 positions
# GPUs: 1 x L4. Only this machine can ask. For others: --host 0.0.0.0, and a key in VLLM_API_KEY.
# The hub's token, where the model needs one, is in HF_TOKEN.
export VLLM_NO_USAGE_STATS=1
exec vllm serve mistralai/Mistral-7B-Instruct-v0.3 \
  --tokenizer-mode mistral \
  --config-format mistral \
  --load-format mistral \
  --generation-config vllm \
  --served-model-name mistralai/Mistral-7B-Instruct-v0.3 \
  --dtype bfloat16 \
  --max-model-len 32768 \
  --tensor-parallel-size 1 \
  --gpu-memory-utilization 0.9 \
  --host 127.0.0.1 \
  --port 8000 \
  "$@"
