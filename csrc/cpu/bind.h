// Converts tensors to the arguments of the kernels. Python has checked the shapes and dtypes
// (checks.py).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>

#include "ops.h"

namespace selfnpo {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Array array(const Tensor& t) { return {t.data_ptr(), t.scalar_type()}; }
inline Array array(const MaybeTensor& t) { return t ? array(*t) : Array{}; }

template <class T>
const T* pointer(const MaybeTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

// The kernels read table rows by index. An index outside the table would read other memory.
inline void check_rows(const char* name, const int64_t* index, int64_t count, int64_t least, int64_t rows) {
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(index[i] >= least && index[i] < rows, name, " holds ", index[i], "; expected ", least, " to ",
                      rows - 1);
  }
}

inline Table table(const Tensor& k, const MaybeTensor& index) {
  if (index) check_rows("index", pointer<int64_t>(index), index->numel(), 0, k.size(0));
  return {k.const_data_ptr<float>(), k.size(0), k.size(1), pointer<int64_t>(index)};
}

inline Noise noise(int64_t seed, const MaybeTensor& sample_ids, int64_t draw, const MaybeTensor& draws) {
  return {sample_ids.has_value(), static_cast<uint64_t>(seed), pointer<int64_t>(sample_ids), draw,
          pointer<int64_t>(draws)};
}

inline int64_t samples(const Tensor& t) { return t.size(0); }
inline int64_t elements(const Tensor& t) { return t.size(0) == 0 ? 0 : t.numel() / t.size(0); }

}  // namespace selfnpo
