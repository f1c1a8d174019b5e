// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/output_room.h"

#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"

namespace dynsplit {

absl::StatusOr<Buffer> OutputRoom::Take(int64_t size_bytes) {
  if (size_bytes <= 0) return Buffer();
  absl::MutexLock lock(&mu_);
  const int64_t begin = Aligned(taken_bytes_);
  if (begin > size_bytes_ || size_bytes > size_bytes_ - begin) {
    return InvalidField(
        "output.byte_size",
        absl::StrCat("is ", size_bytes_, "; the layers decided so far need ", begin + size_bytes,
                     ", and ", enough_bytes_, " are enough for whatever stays"));
  }
  taken_bytes_ = begin + size_bytes;
  return Buffer(part_.data + begin, size_bytes, nullptr);
}

RegionName OutputRoom::NameOf(const std::byte* data) const {
  RegionName name = begin_;
  name.offset_bytes += data - part_.data;
  return name;
}

}  // namespace dynsplit
