// Element types, activations and cells: what the core and its callers both name.
#pragma once

#include <cstdint>

namespace torchq {

// The element types the core reads and writes.
enum class DType : int { f32, bf16, f16, u8, i8, i32 };

constexpr int64_t element_bytes(DType d) {
  return d == DType::f32 || d == DType::i32 ? 4 : d == DType::bf16 || d == DType::f16 ? 2 : 1;
}

// 16-bit floats as bits. They are types of their own so that load() and store() can be overloaded.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// The function applied to y after the bias. activations.inc has the formulas.
enum class Activation : int { none, relu, gelu, gelu_tanh, silu, quick_gelu, hardswish, relu2, tanh, sigmoid, relu6 };
constexpr int kActivations = 11;

// Recurrent cells, and the gates of each: as many products of x and of h as there are hidden values. cell.inc has the
// formulas.
enum class Cell : int { lstm, gru, rnn_tanh, rnn_relu };
constexpr int kCells = 4;
constexpr int gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }

}  // namespace torchq
