// The warp of `experts` that loads.

#ifndef JAX_ROUTER_CUDA_EXPERTS_LOAD_CUH_
#define JAX_ROUTER_CUDA_EXPERTS_LOAD_CUH_

#include <cstdint>

#include "experts_work.cuh"
#include "pipeline.cuh"

namespace jax_router {

// Half of the weights of a stage: 64 rows of the hidden size, which is innermost but in float8.
template <ExpertsType kType, bool kMulticast>
__device__ __forceinline__ void load_weights(uint32_t shared, const CUtensorMap* map, int hidden,
                                             int depth, int half, uint32_t barrier, uint32_t blocks,
                                             uint64_t policy) {
  shared += half * (64 * 128);
  hidden += half * 64;
  if constexpr (kType == ExpertsType::kFloat8) {
    load_box<kMulticast>(shared, map, depth, hidden, barrier, blocks, policy);
  } else {
    load_box<kMulticast>(shared, map, hidden, depth, barrier, blocks, policy);
  }
}

template <ExpertsType kType, int kTokens>
__device__ __forceinline__ void load_pieces(const CUtensorMap* weights_map,
                                            const CUtensorMap* tokens_map, const ExpertsWork& work,
                                            uint32_t memory, int cluster, int rank) {
  using Shape = ExpertsShape<kType, kTokens>;
  const int hidden_block = rank % work.hidden_blocks;
  const int token_block = rank / work.hidden_blocks;
  const uint32_t same_tokens = ((1u << work.hidden_blocks) - 1) << token_block * work.hidden_blocks;
  uint32_t same_weights = 0;
  for (int i = 0; i < work.token_blocks; ++i) {
    same_weights |= 1u << (hidden_block + i * work.hidden_blocks);
  }
  const int share = hidden_block * (kTokens / work.hidden_blocks);  // of the tokens, from here on
  // Weights are read once, or soon again for other tokens.
  const uint64_t weights_policy =
      work.token_groups > 1 ? evict_normal_policy() : evict_first_policy();
  RingStage<Shape::kStages> stage;
  Verdicts verdicts(memory + Shape::kVerdictAt, work.hidden_blocks * work.token_blocks);
  bool masked = false;
  uint32_t row = 0;
  ExpertsPiece piece;
  for (int i = 0; work.schedule.piece(cluster, i, &piece); i += masked ? 0 : 1) {
    const int hidden =
        (piece.tile / work.token_groups * work.hidden_blocks + hidden_block) * kHiddenTile;
    const int token = (piece.tile % work.token_groups * work.token_blocks + token_block) * kTokens;
    ChosenExperts experts(work, piece.begin, piece.end);
    for (int expert; experts.next(&expert);) {
      const int stages = work.blocks * work.parts;
#pragma unroll 1
      for (int at = expert * stages, left = stages; left > 0; ++at, --left) {
        const uint32_t full = memory + Shape::kFullAt + stage.index * 8;
        wait_barrier(full + Shape::kEmptyAt - Shape::kFullAt, stage.parity ^ 1);
        // Multipliers come with the first stage of a block.
        const bool first = kType == ExpertsType::kFloat8 || left == stages;
        arrive_expecting(full,
                         Shape::kWeightBytes + Shape::kTokenBytes + (first ? Shape::kRowBytes : 0));
        const int depth = at * Shape::kDepth;
        // Two boxes of 64 rows of the hidden size; where two blocks have the same, one each.
        const uint32_t weights = memory + stage.index * Shape::kWeightBytes;
        if (work.token_blocks > 1) {
          load_weights<kType, true>(weights, weights_map, hidden, depth, token_block, full,
                                    same_weights, weights_policy);
        } else {
          load_weights<kType, false>(weights, weights_map, hidden, depth, 0, full, 0,
                                     weights_policy);
          load_weights<kType, false>(weights, weights_map, hidden, depth, 1, full, 0,
                                     weights_policy);
        }
        const uint32_t tokens =
            memory + Shape::kTokensAt + stage.index * Shape::kTokenBytes + share * 128;
        if (work.hidden_blocks > 1) {
          load_box<true>(tokens, tokens_map, depth, token + share, full, same_tokens);
        } else {
          load_box<false>(tokens, tokens_map, depth, token + share, full, 0);
        }
        if (first) {
          const int block = kType == ExpertsType::kFloat8 ? at : expert;
          load_row(memory + Shape::kRowsAt + row * Shape::kRowBytes,
                   work.multipliers + block * work.padded_tokens + token, Shape::kRowBytes, full);
          row = row + 1 == Shape::kRows ? 0 : row + 1;
        }
        stage.advance();
      }
    }
    masked = !masked && verdicts.again(true, 0, 1);
  }
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_EXPERTS_LOAD_CUH_
