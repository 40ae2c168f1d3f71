"""Megatron-LM's flags that are not ours, each with its answer.

The names were collected from Megatron-LM's argument parser from release 2.5 up to 2026, from the configuration classes
that newer releases make flags of, and from megatron-core 0.16.1. The reasons are ours.
"""

from __future__ import annotations

from megatron_telechat.config.megatron.answers import Always, Answer, Ignored, Refused

BLOCKS: tuple[tuple[Answer, str], ...] = (
    # other families
    (
        Refused("elastic sub-networks are not part of this framework", another_model=True),
        """
        add-skipping basemodel-type binary-mask budget-list budget-probs budget-type disable-budget
        enable-router flex-hetero-ffn flex-hetero-mamba flex-hetero-moe-expert flex-strict flextron
        flextron-config-file force-emb force-mamba force-mlp force-router-skip freeze-all-layers freeze-model
        freeze-router hard-sample-th is-flex-eval layer-ranking-list linear-scaler-end linear-scaler-start
        log-budgets loss-alpha lr-mult-router mlp-int-list mlp-per-list moe-expert-int-list
        moe-expert-per-list no-attn-skip normalize-router-logits original-model-sample-prob
        override-selected-budget param-budget-target router-beta router-gbs router-inter-dim router-std
        skip-num-attn-layer-constraint skip-total-layer-constraint slice soft-mask tau-decay tau-init
        """,
    ),
    (
        Refused("retrieval models are not part of this framework", another_model=True),
        """
        bert-embedder-type bert-load bert-no-binary-head biencoder-projection-dim
        biencoder-shared-query-context-model block-data-path emb-int-list emb-per-list embedding-path
        evidence-data-path head-lr-mult ict-head-size ict-load indexer-batch-size indexer-log-interval
        mask-prob output-bert-embeddings query-in-block-prob relative-attention-max-distance
        relative-attention-num-buckets retriever-report-topk-accuracies retriever-score-scaling
        retriever-seq-length retro-add-retriever retro-attention-gate retro-cyclic-train-iters
        retro-encoder-attention-dropout retro-encoder-hidden-dropout retro-encoder-layers
        retro-no-verify-neighbor-count retro-num-neighbors retro-num-retrieved-chunks retro-project-dir
        retro-return-doc-ids retro-workdir short-seq-prob titles-data-path use-one-sent-docs
        """,
    ),
    (
        Refused("sparse attention is not part of these models", another_model=True),
        """
        disable-dsa-indexer-rotate-activation
        disable-dsa-indexer-scoring-relu dsa-indexer-head-dim dsa-indexer-k-norm-epsilon
        dsa-indexer-k-norm-fp32 dsa-indexer-loss-coeff dsa-indexer-n-heads dsa-indexer-rope-interleaved
        dsa-indexer-skip-topk-offset dsa-indexer-topk dsa-indexer-topk-freq dsa-indexer-use-sparse-loss
        dsa-kernel-backend no-dsa-indexer-rotate-activation no-dsa-indexer-scoring-relu
        """,
    ),
    (
        Refused("multi-latent attention is not part of these models"),
        """
        beta-fast beta-slow cache-mla-latents fused-single-qkv-rope mla-down-proj-fusion mscale mscale-all-dim
        no-rope-freq no-yarn-correction-range-round-to-int original-max-position-embeddings rope-type
        rotary-scaling-factor yarn-beta-fast yarn-beta-slow yarn-correction-range-round-to-int
        yarn-original-max-position-embeddings
        """,
    ),
    (
        Refused("the chat templates are those of TeleChat", "--sft-template"),
        "chat-template sft-tokenizer-prompt-format",
    ),
    (
        Refused("samples have a fixed length: dialogs are packed to --seq-length"),
        "hybrid-context-parallel max-seqlen-per-dp-cp-rank variable-seq-lengths",
    ),
    (
        Refused("vision models are not part of this framework", another_model=True),
        """
        classes-fraction data-per-class-fraction dino-bottleneck-size dino-freeze-last-layer
        dino-head-hidden-size dino-local-crops-number dino-local-img-size dino-norm-last-layer
        dino-teacher-temp dino-warmup-teacher-temp dino-warmup-teacher-temp-epochs img-dim img-h img-w
        iter-per-epoch mask-factor mask-type mrope-section num-channels num-classes patch-dim
        swin-backbone-type vision-backbone-type vision-pretraining vision-pretraining-type
        """,
    ),
    (
        Refused("encoder-decoder models are not part of this framework", another_model=True),
        """
        decoder-num-layers decoder-seq-length encoder-pipeline-model-parallel-size encoder-seq-length
        encoder-tensor-model-parallel-size pipeline-model-parallel-split-rank vocab-extra-ids
        """,
    ),
    (
        Refused("state-space, hybrid and linear-attention models are not part of this framework", another_model=True),
        """
        disable-mamba-mem-eff-path experimental-attention-variant gdp-cutedsl-kernel
        gdp-num-chunk-states-to-recompute gdp-num-householder heterogeneous-block-specs
        heterogeneous-layers-config-encoded-json heterogeneous-layers-config-path hybrid-attention-ratio
        hybrid-layer-pattern hybrid-mlp-ratio hybrid-override-pattern is-hybrid-model linear-attention-freq
        linear-conv-kernel-dim linear-key-head-dim linear-num-key-heads linear-num-value-heads
        linear-value-head-dim mamba-head-dim mamba-inference-conv-states-dtype
        mamba-inference-ssm-states-dtype mamba-int-list mamba-num-groups mamba-num-heads mamba-per-list
        mamba-state-dim mamba-training-ssm-states-dtype use-mamba-mem-eff-path
        """,
    ),
    (Refused("the layers are those of this framework"), "spec"),
    (
        Refused("distillation is not part of this framework"),
        """
        distill-coeff distill-only distillation export-kd-cfg export-kd-finalize export-kd-teacher-ckpt-format
        export-kd-teacher-load export-kd-teacher-model-config logits-load-decode-threads logits-load-dir
        logits-load-ignore-errors logits-load-kd-loss-alpha logits-load-msc-prefetch-depth
        logits-load-prefetch-factor logits-save-dir logits-save-dtype logits-save-top-k logits-save-top-p
        logits-save-top-p-min-k teacher-model-config
        """,
    ),
    (Refused("gpt-oss layers are not part of these models", another_model=True), "enable-gpt-oss"),
    (
        Refused("hyper-connections are not part of these models", another_model=True),
        """
        enable-mhc-connections mhc-init-gating-factor mhc-num-residual-streams mhc-recompute-layer-num
        mhc-sinkhorn-iterations
        """,
    ),
    (
        Refused(
            "quantisation-aware training and model export for inference are not part of this framework",
            "tools/convert_checkpoint.py export, for the Hugging Face layout",
        ),
        """
        export-default-te-spec export-draft-vocab-size export-eagle-algorithm export-force-local-attention
        export-freeze-mtp export-kv-cache-quant export-legacy-megatron export-model-type
        export-moe-apply-probs-on-input export-num-eagle-layers export-num-medusa-heads export-num-mtp
        export-offline-model export-qk-l2-norm export-quant-cfg export-real-quant-cfg export-te-mcore-model
        finetune-data-files finetune-data-split finetune-hf-dataset kitchen-attention-backend
        kitchen-config-file kitchen-recipe-number modelopt-enabled qad-train-target quant-recipe
        te-precision-config-file use-kitchen use-kitchen-attention
        """,
    ),
    (
        Refused("fill-in-the-middle samples are not made here"),
        """
        fim-data fim-eod-token fim-fragment-rate fim-middle-token fim-no-prefix fim-pad-token fim-prefix-token
        fim-rate fim-split-sample fim-spm-rate fim-suffix-token
        """,
    ),
    (
        Refused("multi-token prediction is not part of these models"),
        "freeze-base-for-mtp mtp-detach-heads mtp-loss-scaling-factor",
    ),
    (
        Refused("multi-token prediction of this kind is not part of these models", another_model=True),
        "mtp-hsm mtp-hybrid-override-pattern mtp-standalone mtp-use-repeated-layer",
    ),
    (
        Refused("reinforcement learning is not part of this framework"),
        """
        grpo-clamp-eps-lower grpo-clamp-eps-upper grpo-default-temperature grpo-default-top-p
        grpo-entropy-term-weight grpo-filter-groups-with-same-reward grpo-group-size grpo-iterations
        grpo-kl-beta grpo-prompts-per-step langrl-env-config langrl-external-server
        langrl-inference-server-conversation-template langrl-inference-server-type perform-rl-step
        refit-method rl-calculate-intra-group-similarity rl-consumption-granularity rl-default-temperature
        rl-default-top-k rl-default-top-p rl-durable-rollout-bank rl-generation-batch-size rl-generation-lag
        rl-importance-sampling-truncation-coef rl-inference-expert-model-parallel-size
        rl-inference-expert-tensor-model-parallel-size rl-inference-logprobs-is-correction
        rl-inference-model-unified-memory-level rl-inference-parsers rl-inference-pipeline-model-parallel-size
        rl-inference-tensor-model-parallel-size rl-kv-cache-management-mode rl-max-inflight-requests
        rl-num-parallel-generation-batches rl-num-parallel-generations
        rl-offload-inference-model-weights-when-idle rl-offload-kv-cache-during-training
        rl-offload-optimizer-during-inference rl-parallel-generation-tasks rl-partial-rollouts
        rl-persist-cuda-graphs rl-profile rl-profile-dir rl-prompts-per-eval
        rl-remove-kv-cache-during-training rl-reset-cuda-graphs rl-rollout-bank-dir rl-rollout-bank-max-bytes
        rl-sequence-packing-algo rl-sequence-packing-bin-size rl-sequence-packing-max-sequences-per-bin
        rl-skip-bos-token rl-submission-granularity rl-training-cuda-graphs rl-use-sequence-packing
        rl-verify-model-weights-swap
        """,
    ),
    # inference
    (
        Ignored("generation has its own command, tools/generate.py"),
        """
        batch-boundaries batch-invariant-backend batch-invariant-mode bpe-kv-cache bpe-max-buffer bpe-params
        bpe-ssm-cache coordinator-schedule-output-path decode-only-cuda-graphs disable-chunked-prefill
        drain-between-batches enable-chunked-prefill flash-decode incoming-requests-duration
        incoming-requests-per-sec incoming-requests-per-step inference-batch-times-seqlen-threshold
        inference-ckpt-non-strict inference-coordinator-port inference-cuda-graph-all-prefills
        inference-cuda-graph-max-tokens inference-cuda-graph-scope inference-disable-ep-consensus
        inference-disable-triton-nvls-kernels inference-dynamic-batching
        inference-dynamic-batching-async-sched-mode inference-dynamic-batching-block-size
        inference-dynamic-batching-buffer-guaranteed-fraction
        inference-dynamic-batching-buffer-overflow-factor inference-dynamic-batching-buffer-size-gb
        inference-dynamic-batching-chunk-size inference-dynamic-batching-cuda-graph-max-tokens
        inference-dynamic-batching-cuda-graph-mixed-prefill-count
        inference-dynamic-batching-cuda-graph-sizing-distribution inference-dynamic-batching-logprobs-mode
        inference-dynamic-batching-mamba-memory-ratio inference-dynamic-batching-max-requests
        inference-dynamic-batching-max-requests-override inference-dynamic-batching-max-tokens
        inference-dynamic-batching-max-tokens-override inference-dynamic-batching-num-cuda-graphs
        inference-dynamic-batching-paused-buffer-size-gb inference-dynamic-batching-prefix-caching
        inference-dynamic-batching-prefix-caching-coordinator-policy
        inference-dynamic-batching-prefix-caching-eviction-policy
        inference-dynamic-batching-prefix-caching-mamba-gb
        inference-dynamic-batching-prefix-caching-routing-alpha inference-dynamic-batching-sampling-backend
        inference-dynamic-batching-track-generated-token-events
        inference-dynamic-batching-track-paused-request-events inference-dynamic-batching-unified-memory-level
        inference-fuse-tp-communication inference-grouped-gemm-backend inference-logging-step-interval
        inference-max-batch-size inference-max-requests inference-max-seq-length
        inference-moe-disable-fused-quant-kernels inference-moe-token-dispatcher-type inference-repeat-n
        inference-rng-tracker inference-sampling-seed inference-shards inference-text-gen-server-logging
        inference-use-synchronous-zmq-collectives inference-wandb-logging max-tokens-to-oom mem-batch-size
        mem-infer-seq-len mlp-chunks-for-prefill model-provider
        moe-pad-experts-for-cuda-graph-inference nccl-all-reduce-for-prefill num-speculative-tokens
        num-tokens-from-file num-tokens-to-generate num-tokens-to-prompt output-every-n-results output-path
        output-request-events prefill-chunk-size prompt-file prompt-file-num-truncate prompts
        result-rejected-tracker-filename return-log-probs sample-rate skip-prompt-log-probs stop-words
        suspend-resume-interval suspend-timeout symmetric-ar-type temperature termination-id
        throughput-check-only top-k top-n-logprobs top-p use-flashinfer-fused-rope use-gigatoken
        use-inference-optimized-layers use-legacy-static-engine
        """,
    ),
    # precision
    (
        Always("gradients are reduced in fp32"),
        """
        accumulate-allreduce-grads-in-fp32 ddp-param-name-patterns-for-fp32-local-accumulation
        ddp-reduce-scatter-with-fp32-accumulation grad-reduce-in-fp32 reduce-scatter-with-fp32-accumulation
        """,
    ),
    (
        Refused("parameters are bf16 and their gradients fp32, with FP8 products too", "--fp8-format"),
        """
        fp8-param fp8-param-gather keep-fp8-transpose-cache keep-fp8-transpose-cache-when-using-custom-fsdp
        reuse-grad-buf-for-mxfp8-param-ag
        """,
    ),
    (
        Refused("FP8 is in all layers or in none", "--fp8-format"),
        "first-last-layers-bf16 num-layers-at-end-in-bf16 num-layers-at-start-in-bf16",
    ),
    (
        Refused(
            "FP8 is in the products of the attention projections and of the dense MLPs, and nowhere else",
            "--fp8-format",
        ),
        """
        activation-func-fp8-input-store fp8-dot-product-attention fp8-multi-head-attention fp8-output-proj
        fp8-quantizer-factory
        """,
    ),
    (
        Refused("Transformer Engine 2 computes the gradients of weights in FP8, and ignores what says otherwise"),
        "disable-fp8-wgrad no-fp8-wgrad",
    ),
    (Always("Transformer Engine 2 computes the gradients of weights in FP8, too"), "fp8-wgrad"),
    (Ignored("the scales of FP8 are computed for every micro-batch"), "fp8-interval"),
    (
        Refused("the largest values of delayed scaling are those of all ranks of a pipeline stage"),
        "tp-only-amax-red",
    ),
    (
        Ignored("the experts stay bf16, with FP8 products too"),
        "moe-router-padding-for-fp8 moe-router-padding-for-quantization",
    ),
    (Ignored("Transformer Engine keeps the weights of a step in FP8"), "disable-parameter-transpose-cache"),
    (
        Refused("4-bit training is not here, and 8-bit training has another flag", "--fp8-format"),
        "fp4 fp4-format fp4-param fp4-param-gather fp4-quantizer-factory fp4-recipe fp8",
    ),
    (
        Refused(
            "parameters, residual stream, logits and pipeline messages have the one compute type of the run",
            "--precision",
        ),
        """
        autocast-dtype enable-autocast fp32-residual-connection output-logit-dtype params-dtype pipeline-dtype
        """,
    ),
    (Refused("the loss is computed in fp32"), "fp16-lm-cross-entropy"),
    (
        Refused("the softmax of the attention is computed in fp32"),
        "disable-attention-softmax-in-fp32 no-attention-softmax-in-fp32",
    ),
    (Refused("scores are not scaled by the layer number"), "apply-query-key-layer-scaling"),
    (Always("the softmax of the attention is computed in fp32"), "attention-softmax-in-fp32"),
    (
        Ignored("the matrix products follow torch's own setting"),
        "disable-bf16-reduced-precision-matmul",
    ),
    (
        Always("gradients and master weights are fp32", ("fp32",)),
        "main-grads-dtype main-params-dtype megatron-fsdp-main-grads-dtype megatron-fsdp-main-params-dtype",
    ),
    (Refused("gradients are reduced in fp32"), "grad-reduce-in-bf16"),
    (Refused("the loss scale of fp16 is dynamic", "--initial-loss-scale"), "loss-scale"),
    (
        Refused("master weights are whole fp32 numbers, which the optimizer's step reads kernel by kernel"),
        "optimizer-cuda-graph preserve-fp32-weights store-param-remainders",
    ),
    (
        Always("the types of the moments are those of --exp-avg-dtype and --exp-avg-sq-dtype, with every optimizer"),
        "use-precision-aware-optimizer",
    ),
    (
        Ignored("state on the host is updated on the device, by the optimizer that a run without offload has"),
        "use-torch-optimizer-for-cpu-offload",
    ),
    (
        Ignored("gradients stay on the device; what the host keeps of the optimizer is in pinned memory"),
        "no-pin-cpu-grads no-pin-cpu-params pin-cpu-grads pin-cpu-params",
    ),
    (Always("scores are not scaled by the layer number"), "no-query-key-layer-scaling"),
    # architecture
    (
        Refused("the MLP is a SwiGLU"),
        """
        activation-func-clamp-value glu-linear-offset moe-mlp-glu-interleave-size
        moe-shared-expert-glu-interleave-size onnx-safe use-fused-weighted-squared-relu use-te-activation-func
        """,
    ),
    (
        Refused("every norm is a plain RMSNorm with its weight from 1"),
        """
        apply-layernorm-1p apply-residual-connection-post-layernorm apply-wd-to-qk-layernorm
        fused-residual-rmsnorm layernorm-zero-centered-gamma qk-l2-norm
        """,
    ),
    (
        Refused("the attention is causal softmax attention over the whole sample"),
        """
        mup-attn-scale-power mup-base-head-dim mup-base-hidden-size mup-embedding-mult mup-output-mult
        mup-width-mult qk-clip qk-clip-alpha qk-clip-threshold softmax-scale softmax-type use-mup
        """,
    ),
    (
        Refused("attention with a gate is not part of these models", another_model=True),
        "attention-output-gate",
    ),
    (
        Refused("all data-parallel ranks start from the same weights"),
        "data-parallel-random-init use-same-sampling-seed-across-dp-ranks",
    ),
    (
        Refused("weights are drawn from a normal distribution", "--init-method-std, --router-init-std"),
        """
        embedding-init-method embedding-init-method-std init-method init-method-xavier-uniform
        output-layer-init-method
        """,
    ),
    (Always("--activation sets it"), "gated-linear-unit"),
    (Always("the MLP is a SwiGLU", ("silu", "swiglu"), fix="--activation"), "activation-func"),
    (Always("--num-query-groups sets it"), "group-query-attention"),
    (
        Ignored("initial weights do not depend on the device or the layout"),
        """
        init-model-with-meta-device lazy-mpu-init no-initialization perform-initialization
        use-cpu-initialization
        """,
    ),
    (Always("--position-embedding-type sets it"), "no-position-embedding"),
    (
        Refused(
            "long contexts use NTK-aware scaling here", "--rotary-base, --rotary-training-seqlen, --rotary-base-seqlen"
        ),
        "rope-scaling-factor rotary-seq-len-interpolation-factor use-rope-scaling",
    ),
    (Refused("rotary channels are paired half against half, as in the published weights"), "rotary-interleaved"),
    (Always("the whole head is rotated", ("1.0", "1")), "rotary-percent"),
    (Refused("the model is built on Megatron-Core"), "use-legacy-models"),
    (Always("the model is built on Megatron-Core"), "use-mcore-models"),
    # MoE
    (
        Ignored("the MoE block has its own exchange, permutation and schedule"),
        """
        ep-overlap-early-attn-memory-release high-priority-a2a-comm-stream
        mlp-chunks-for-training moe-combine-bwd-dtype moe-deepep-num-sms moe-dispatch-fwd-dtype
        moe-enable-deepep moe-flex-dispatcher-backend moe-flex-dispatcher-num-sms
        moe-hybridep-num-blocks-permute moe-hybridep-num-blocks-unpermute moe-hybridep-num-sms
        moe-hybridep-num-sms-preprocessing moe-hybridep-pad-uneven-dispatch-inputs moe-ncclep-static-shape
        moe-ncclep-zero-copy moe-permute-fusion moe-permute-fusion-into-hybridep moe-router-fusion
        moe-single-grouped-bias moe-single-grouped-weight moe-use-grouped-tensor
        moe-use-legacy-grouped-gemm use-grouped-gemm-for-dense-mlp use-grouped-gemm-for-shared-expert
        """,
    ),
    (
        Ignored(
            "the exchange overlaps inside of each MoE layer, between pieces of one micro-batch: "
            "--moe-input-chunks auto (or a number) turns that on"
        ),
        "overlap-moe-expert-parallel-comm",
    ),
    (
        Ignored(
            "with --moe-input-chunks auto (or a number) the weight gradients of a piece already fill the gaps "
            "of the exchange in the backward"
        ),
        "delay-wgrad-compute overlap-dispatch-backward-with-experts-wgrad",
    ),
    (
        Ignored(
            "the shared expert runs beside no exchange here; what hides the exchange is --moe-input-chunks auto (or a "
            "number)"
        ),
        "moe-shared-expert-overlap",
    ),
    (
        Refused("the router is a plain top-k softmax router"),
        """
        moe-input-jitter-eps moe-router-bias-update-rate moe-router-enable-expert-bias moe-router-force-biased
        moe-router-force-load-balancing moe-router-group-topk moe-router-num-groups
        moe-router-quantile-balancing-ema moe-router-topk-limited-devices
        """,
    ),
    (Refused("experts have the width of the model", another_model=True), "moe-latent-size"),
    (
        Refused("an expert is a SwiGLU on the hidden states, its output weighted by the router"),
        "moe-apply-probs-on-input",
    ),
    (Refused("a dense model is not turned into a mixture here"), "moe-upcycling-granularity moe-use-upcycling"),
    (
        Refused("the experts are dropless"),
        """
        moe-expert-capacity-factor moe-expert-rank-capacity-factor moe-pad-expert-input-to-capacity
        moe-token-drop-policy moe-token-dropping
        """,
    ),
    (
        Refused("activations of the experts are kept on the device as they come", "--recompute-granularity"),
        """
        moe-paged-stash moe-paged-stash-buffer-size-factor-cpu moe-paged-stash-buffer-size-factor-cuda
        moe-paged-stash-page-size
        """,
    ),
    (
        Refused(
            "the tensor domain inside an expert has its own size",
            "--expert-tensor-parallel-size, or --fold-tensor-into-experts",
        ),
        "moe-extended-tp",
    ),
    (
        Always("the experts of a rank run as grouped products on an accelerator, one after the other on a CPU"),
        "moe-grouped-gemm",
    ),
    (
        Refused(
            "recompute of the experts is a module of selective recompute",
            "--recompute-granularity selective --recompute-modules moe",
        ),
        "moe-layer-recompute",
    ),
    (
        Ignored("the expert load is in every console line and in metrics.jsonl"),
        "moe-per-layer-logging save-tokens-per-expert-interval",
    ),
    (
        Refused(
            "the experts' choices are recorded into one folder and replayed from another",
            "--moe-routing-record DIR or --moe-routing-replay DIR",
        ),
        "moe-enable-routing-replay",
    ),
    (
        Ignored("--moe-routing-record DIR writes the experts' choices, and no other trace of the router is written"),
        """
        moe-routing-trace-capture-hidden-states moe-routing-trace-capture-logits moe-routing-trace-dump-weights
        moe-routing-trace-max-inference-steps moe-routing-trace-max-training-iters moe-routing-trace-path
        """,
    ),
    (Always("the router computes in fp32", ("fp32",)), "moe-router-dtype"),
    (
        Always(
            "the router is balanced by the auxiliary loss of --moe-aux-loss-coeff",
            ("aux_loss",),
            fix="--moe-aux-loss-coeff 0, for no balancing",
        ),
        "moe-router-load-balancing-type",
    ),
    (
        Refused("the weights of a token's experts always add up to 1, as in the published models"),
        "moe-router-pre-softmax",
    ),
    (Always("the router's scores are a softmax", ("softmax",)), "moe-router-score-function"),
    (Always("the experts' output is not scaled", ("1.0", "1")), "moe-router-topk-scaling-factor"),
    (
        Always("the MoE block has its own all-to-all exchange", ("alltoall", "allgather", "flex", "alltoall_seq")),
        "moe-token-dispatcher-type",
    ),
    # parallelism
    (
        Ignored("buckets and the order of reduction follow Megatron-Core's defaults"),
        """
        DDP-impl align-param-gather average-in-collective bucket-size ddp-average-in-collective
        ddp-bucket-size ddp-num-buckets ddp-pad-buckets-for-high-nccl-busbw delay-param-gather
        disable-align-grad-reduce gradient-reduce-div-fusion no-align-grad-reduce no-align-param-gather
        no-contiguous-buffers-in-local-ddp no-delay-grad-reduce no-gradient-reduce-div-fusion
        no-use-layer-wise-param-layout overlap-param-gather-with-optimizer-step
        pad-buckets-for-high-nccl-busbw use-contiguous-buffers-in-ddp
        """,
    ),
    (
        Refused("an embedding on a stage of its own is written as a layout", "--pipeline-model-parallel-layout"),
        "standalone-embedding-stage",
    ),
    (
        Ignored("communication inside a tensor-parallel layer is left to Megatron-Core's defaults"),
        """
        async-tensor-model-parallel-allreduce disable-async-tensor-model-parallel-allreduce
        disable-tp-comm-bulk-dgrad disable-tp-comm-bulk-wgrad disable-tp-comm-overlap-ag
        disable-tp-comm-overlap-rs disable-tp-comm-split-ag disable-tp-comm-split-rs
        no-async-tensor-model-parallel-allreduce no-tp-comm-bulk-dgrad no-tp-comm-bulk-wgrad
        no-tp-comm-overlap-ag no-tp-comm-overlap-rs no-tp-comm-split-ag no-tp-comm-split-rs tp-comm-atomic-ag
        tp-comm-atomic-rs tp-comm-bulk-dgrad tp-comm-bulk-wgrad tp-comm-overlap tp-comm-overlap-ag
        tp-comm-overlap-cfg tp-comm-overlap-disable-fc1 tp-comm-overlap-disable-qkv tp-comm-overlap-rs
        tp-comm-overlap-rs-dgrad tp-comm-split-ag tp-comm-split-rs
        """,
    ),
    (
        Ignored("transfers between pipeline stages follow from the schedule"),
        """
        batch-p2p-comm batch-p2p-sync clone-scatter-output-in-embedding deallocate-pipeline-outputs
        defer-embedding-wgrad-compute disable-batch-p2p-comm disable-batch-p2p-sync
        disable-clone-scatter-output-in-embedding no-batch-p2p-comm no-batch-p2p-sync
        no-clone-scatter-output-in-embedding no-scatter-gather-tensors-in-pipeline
        overlap-p2p-comm-warmup-flush
        overlap-p2p-communication-warmup-flush wgrad-deferral-limit
        """,
    ),
    (Ignored("each rank reads the samples of its own place in the global batch"), "no-data-sharding"),
    (
        Ignored("recompute is the same for every micro-batch"),
        "num-microbatches-with-partial-activation-checkpoints",
    ),
    (Ignored("neighbouring stages exchange messages rank to rank"), "use-ring-exchange-p2p"),
    (
        Ignored("one time limit holds for the whole run: --distributed-timeout-minutes"),
        "distributed-timeout-seconds-after-init",
    ),
    (
        Ignored("the backend of the collectives follows from --device"),
        """
        create-all-gather-group disable-gloo-process-groups disable-symmetric-registration distributed-backend
        fake-process-group high-priority-stream-groups
        nccl-communicator-config-path nccl-ub pipeline-model-parallel-comm-backend
        sharp-enabled-group tp-comm-bootstrap-backend use-nccl-ub
        use-sharp
        """,
    ),
    (
        Refused(
            "parameters and gradients are whole on every data-parallel rank; the optimizer state alone can be sharded",
            "--use-distributed-optimizer",
        ),
        """
        data-parallel-sharding-strategy disable-strict-fsdp-dtensor-load enable-full-sharding-in-hsdp
        expert-gtp-weight-remat-size expert-tensor-parallel-num-weight-shards
        fsdp-db-use-persist-buf-on-alloc-fail fsdp-double-buffer fsdp-manual-registration
        gtp-expert-remat-nccl-ub gtp-remat-nccl-ub gtp-remat-opt-in-modules
        gtp-remat-reduce-scatter-with-fp32-accumulation gtp-weight-remat-size
        megatron-fsdp-enable-fine-grained-param-gather megatron-fsdp-grad-comm-dtype
        megatron-fsdp-max-pool-double-buffer megatron-fsdp-version no-strict-fsdp-dtensor-load
        outer-dp-sharding-strategy suggested-communication-unit-size tensor-parallel-num-weight-shards
        torch-fsdp2-no-reshard-after-forward use-custom-fsdp use-megatron-fsdp use-torch-fsdp2
        """,
    ),
    (Ignored("torchrun tells the rank"), "local-rank"),
    (Always("there is one instance of the distributed optimizer", ("1",)), "num-distributed-optimizer-instances"),
    (Refused("ranks are ordered tensor, context, expert, data, pipeline"), "use-tp-pp-dp-mapping"),
    # kernels
    (
        Refused("activations are not offloaded to the host here", "--recompute-granularity"),
        """
        activation-offload-fraction cpu-offloading cpu-offloading-activations cpu-offloading-double-buffering
        cpu-offloading-num-layers cpu-offloading-retain-pinned-cpu-buffers cpu-offloading-weights
        delta-offload-bytes-across-pp-ranks disable-cpu-offloading-activations
        fine-grained-activation-offloading fine-grained-offloading-max-inflight-offloads
        min-offloaded-tensor-size no-cpu-offloading-activations offload-modules
        """,
    ),
    (
        Ignored("kernels are chosen by the device and by what is installed"),
        """
        apply-rope-fusion attention-backend disable-jit-fuser bias-activation-fusion bias-dropout-fusion
        cuda-graph-impl cuda-graph-modules
        cuda-graph-retain-backward-graph cuda-graph-scope cuda-graph-use-single-mempool
        cuda-graph-warmup-steps delay-offload-until-cuda-graph disable-cuda-graph-use-single-mempool
        enable-cuda-graph external-cuda-graph flash-attention-version
        gradient-accumulation-fusion masked-softmax-fusion memory-efficient-layer-norm no-bias-dropout-fusion
        no-bias-gelu-fusion no-bias-swiglu-fusion no-cuda-graph-use-single-mempool
        no-gradient-accumulation-fusion no-masked-softmax-fusion no-persist-layer-norm no-rope-fusion
        persist-layer-norm transformer-impl
        use-transformer-engine-op-fuser
        """,
    ),
    (
        Ignored("the loss has one implementation; --loss-chunk-rows sets how many rows of logits it holds at once"),
        "cross-entropy-fusion-impl cross-entropy-loss-fusion",
    ),
    (Always("the attention runs as a fused kernel where the device has one"), "use-flash-attn"),
    (Ignored("Megatron-Core's features are those that this framework uses"), "enable-experimental test-mode"),
    (Ignored("random streams are Megatron-Core's own, kept with the checkpoint"), "te-rng-tracker use-te-rng-tracker"),
    # recompute
    (
        Refused(
            "recompute is asked for by granularity",
            "--recompute-granularity full, --recompute-method, --recompute-num-layers",
        ),
        "activations-checkpoint-method activations-checkpoint-num-layers checkpoint-num-layers",
    ),
    (
        Refused(
            "what recompute saves is split over the tensor domain by sequence parallelism alone", "--sequence-parallel"
        ),
        "distribute-checkpointed-activations distribute-saved-activations",
    ),
    # optimizer
    (Always("the loss is the mean over the tokens that count of the whole global batch"), "calculate-per-token-loss"),
    (
        Refused("the batch changes with the stages of a run only", "--global-batch-size, or stages: in a YAML file"),
        "curr-iteration decrease-batch-size-if-needed rampup-batch-size step-batch-size-schedule",
    ),
    (
        Refused("the optimizer is AdamW with one learning rate"),
        """
        decoupled-lr decoupled-min-lr lion-beta1 lion-beta2 muon-coefficient-type muon-extra-scale-factor
        muon-fp32-matmul-prec muon-momentum muon-nesterov muon-no-split-qkv muon-num-ns-steps
        muon-scalar-optimizer muon-scale-mode muon-split-qkv muon-tp-mode muon-use-nesterov muon-use-syrk
        sgd-momentum
        """,
    ),
    (Always("weight decay is decoupled (AdamW)"), "decoupled-weight-decay"),
    (Refused("weight decay is constant", "--weight-decay"), "end-weight-decay start-weight-decay wd-incr-steps"),
    (Refused("biases and norms have no weight decay, everything else has"), "no-weight-decay-cond-type"),
    (
        Refused("the schedule counts optimizer steps, samples or tokens", "--lr-decay-iters, --lr-warmup-iters"),
        "lr-decay-steps lr-warmup-steps phase-transition-iterations warmup wsd-decay-steps",
    ),
    (Always("the optimizer is AdamW", ("adam", "adamw")), "optimizer"),
    (
        Ignored("the schedule is always the one of the present configuration, also after a resume"),
        "override-lr-scheduler override-opt-param-scheduler",
    ),
    (
        Refused(
            "the schedule is always the one of the present configuration, also after a resume",
            "--config RUN/config.yaml, for that of an earlier run",
        ),
        "use-checkpoint-lr-scheduler use-checkpoint-opt-param-scheduler",
    ),
    (Always("weight decay is constant", ("constant",)), "weight-decay-incr-style"),
    # data
    (
        Ignored(
            "a tokenizer is what its files say; pretraining reads its vocabulary size and end-of-document token, "
            "fine-tuning encodes with it"
        ),
        """
        allow-ambiguous-pad-tokens disable-save-tokenizer-assets
        disable-tokenizer-sentencepiece-ignore-extra-whitespaces
        disable-use-tokenizer-model-from-checkpoint-args legacy-tokenizer no-save-tokenizer-assets
        no-tokenizer-sentencepiece-ignore-extra-whitespaces no-use-tokenizer-model-from-checkpoint-args
        null-tokenizer-eod-id null-tokenizer-pad-id tiktoken-num-special-tokens tiktoken-pattern
        tiktoken-special-tokens tokenizer-hf-include-special-tokens tokenizer-hf-no-include-special-tokens
        tokenizer-hf-no-use-fast tokenizer-hf-use-fast tokenizer-metadata tokenizer-sentencepiece-legacy
        tokenizer-special-tokens trust-remote-code
        """,
    ),
    (
        Refused("prefixes and weights are given directly or in a data.json", "--data-path or --data-json"),
        "data-args-path per-dataset-sequences-path per-split-data-args-path",
    ),
    (Always("indexed datasets are read through a memory map", ("mmap", "infer")), "data-impl"),
    (
        Ignored("the sample index and its threads are managed here"),
        """
        dataloader-defer-npy-index-mmap dataloader-fast-cache-load disable-msc enable-msc
        mid-level-dataset-surplus mmap-warmup no-mmap-bin-files num-dataset-builder-threads
        object-storage-cache-path s3-cache-path
        """,
    ),
    (
        Refused("documents are kept from each other by another flag", "--reset-attention-mask"),
        "dataloader-inter-document-masking",
    ),
    (Always("samples come in the order of the blend, from where the run stopped", ("single",)), "dataloader-type"),
    (
        Ignored("the vocabulary is never padded; --vocab-size is the number of rows"),
        "disable-pad-vocab-size make-vocab-size-divisible-by no-pad-vocab-size",
    ),
    (
        Refused("validation uses the training batch", "--eval-iters, --global-batch-size"),
        """
        eval-global-batch-size eval-micro-batch-size full-validation multiple-validation-sets
        start-eval-at-iter validation-set-names
        """,
    ),
    (Refused("tokenizers are named by one file or folder", "--tokenizer-model"), "merge-file vocab-file"),
    (Always("the attention is causal; no mask is built in the loader"), "no-create-attention-mask-in-dataloader"),
    (Ignored("only training and validation data are read"), "test-data-path"),
    (Always("weights are normalised"), "renormalize-blend-weights"),
    # checkpoint
    (
        Ignored(
            "checkpoints have this framework's own format, which any layout reads and which is committed by a rename"
        ),
        """
        async-ckpt-cpu-priority async-ckpt-io-priority async-ckpt-use-cpu-shm async-strategy
        auto-detect-ckpt-format ckpt-assume-constant-structure ckpt-convert-format ckpt-convert-save
        ckpt-convert-update-legacy-dist-opt-format ckpt-drop-redundant-extra-state ckpt-format
        ckpt-fully-parallel-load ckpt-fully-parallel-load-exchange-algo
        ckpt-fully-parallel-load-per-rank-objects ckpt-fully-parallel-load-process-group
        ckpt-fully-parallel-save ckpt-fully-parallel-save-process-group ckpt-pg-tensors-cache-create
        ckpt-pg-tensors-cache-path disable-ckpt-load-validate-sharding-integrity disable-stream-ckpt-dequant
        dist-ckpt-format dist-ckpt-optim-fully-reshardable dist-ckpt-save-pre-mcore-014 dist-ckpt-strictness
        dist-ckpt-workers distrib-optim-fully-reshardable-mem-efficient dump-param-to-param-group-map
        hetereogenous-dist-checkpoint no-ckpt-fully-parallel-save
        no-ckpt-load-validate-sharding-integrity no-stream-ckpt-dequant override-ckpt-iteration use-dist-ckpt
        non-persistent-local-ckpt-algo use-persistent-ckpt-worker verify-integrity
        """,
    ),
    (
        Refused("the configuration of an earlier run is a YAML file", "--config RUN/config.yaml"),
        "config-logger-dir use-checkpoint-args use-mp-args-from-checkpoint-args yaml-cfg",
    ),
    (
        Ignored("a folder of --load that is not there is refused anyway, unless it is that of --save"),
        "exit-on-missing-checkpoint",
    ),
    (
        Refused("a new run begins with the weights of a checkpoint by another flag", "--pretrained-checkpoint"),
        "load-main-params-from-ckpt load-model-opt-format",
    ),
    (Ignored("the random state always goes with the checkpoint"), "no-load-rng no-save-rng"),
    (
        Refused("checkpoints are kept by number", "--keep-last"),
        """
        persistent-save-interval save-retain-interval
        """,
    ),
    (
        Refused("non-persistent checkpoints lie on the nodes", "--non-persistent-ckpt-type local"),
        "non-persistent-global-ckpt-dir",
    ),
    (Refused("the pretraining command trains", "--train-iters; --eval-interval evaluates on the way"), "skip-train"),
    # logging
    (
        Ignored(
            "metrics.jsonl and the console line always hold loss, learning rate, gradient norm, throughput, MFU, "
            "memory and expert load"
        ),
        """
        log-device-memory-used log-memory-interval log-memory-to-tensorboard log-throughput
        no-log-learnig-rate-to-tensorboard no-record-throughput
        """,
    ),
    (
        Ignored("it is not recorded here; metrics.jsonl has one set of values, which no flag extends"),
        """
        app-tag-run-name app-tag-run-version disable-log-loss-scale-to-tensorboard enable-one-logger
        log-batch-size-to-tensorboard log-energy log-max-attention-logit log-num-zeros-in-grad log-params-norm
        log-progress log-straggler log-timers-to-tensorboard log-validation-ppl-to-tensorboard
        log-world-size-to-tensorboard no-log-loss-scale-to-tensorboard no-one-logger nvtx-ranges one-logger-async
        one-logger-entity one-logger-project one-logger-run-name otel-enabled otel-service-name otel-span-groups
        save-activations-interval save-dgrads-interval save-params-interval save-wgrads-interval
        """,
    ),
    (
        Ignored("messages have one level, and steps are timed without barriers"),
        "barrier-with-L1-time logging-level no-barrier-with-level-1-timing timing-log-level timing-log-option",
    ),
    (
        Ignored("no profiler is driven by flags"),
        """
        memory-profile memory-profile-path memory-snapshot-path profile profile-ranks profile-step-end
        profile-step-start pytorch-profiler-collect-callstack pytorch-profiler-collect-chakra
        pytorch-profiler-collect-shapes record-memory-history record-shapes use-pytorch-profiler
        """,
    ),
    (Ignored("TensorBoard events follow --log-interval"), "tensorboard-log-interval tensorboard-queue-size"),
    (Ignored("the environment variable WANDB_ENTITY sets it"), "wandb-entity"),
    (Ignored("it lies in the run folder"), "wandb-save-dir"),
    # health
    (
        Ignored("a stop signal always ends the run with a checkpoint (exit code 75)"),
        """
        adlr-autoresume adlr-autoresume-interval exit-signal exit-signal-handler
        exit-signal-handler-for-dataloader exit-signal-handler-for-training
        """,
    ),
    (
        Ignored("restarts, stragglers and fault tolerance are not driven by flags"),
        """
        calc-ft-timeouts disable-flight-recorder-dump-on-timeout disable-flight-recorder-extra-dump-on-exec
        disable-flight-recorder-include-only-active disable-straggler-on-startup enable-ft-package
        flight-recorder-dump-path flight-recorder-include-stack-trace flight-recorder-trace-buffer-size
        ft-num-warmup-iters inprocess-active-world-size inprocess-barrier-timeout inprocess-completion-timeout
        inprocess-empty-cuda-cache inprocess-granularity inprocess-hard-timeout inprocess-heartbeat-interval
        inprocess-heartbeat-timeout inprocess-last-call-wait inprocess-max-iterations
        inprocess-monitor-process-interval inprocess-monitor-thread-interval
        inprocess-progress-watchdog-interval inprocess-restart inprocess-soft-timeout
        inprocess-termination-grace-time no-flight-recorder-dump-on-timeout
        no-flight-recorder-extra-dump-on-exec no-flight-recorder-include-only-active
        run-workload-inspector-server straggler-ctrlr-port straggler-minmax-count train-sync-interval
        """,
    ),
    (
        Ignored("loss and gradient norm are checked on all ranks before every optimizer step"),
        """
        check-for-large-grads check-for-nan-in-grad check-for-spiky-loss
        no-check-for-nan-in-loss-and-grad rerun-mode
        """,
    ),
    (
        Ignored(
            "faults are neither injected nor looked for by comparing replicas; tools/doctor.py tests a machine before "
            "a run"
        ),
        "check-weight-hash-across-dp-replicas-interval error-injection-rate error-injection-type "
        "gpu-sniff-test-interval",
    ),
    (
        Ignored("garbage collection is not scheduled by flags"),
        "disable-manual-gc-eval manual-gc manual-gc-interval no-manual-gc-eval",
    ),
)
