// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/regions.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "server/cpu/cpu_backend.h"
#include "server/pipeline/errors.h"

namespace dynsplit {
namespace {

constexpr int64_t kBytes = 3 << 12;

// A shared memory object as a client makes it.
class Object {
 public:
  explicit Object(const std::string& name, int64_t size_bytes = kBytes)
      : key(absl::StrCat("dynsplit-regions-test-", getpid(), "-", name)) {
    const int descriptor = shm_open(("/" + key).c_str(), O_CREAT | O_EXCL | O_RDWR, 0600);
    EXPECT_GE(descriptor, 0);
    EXPECT_EQ(ftruncate(descriptor, size_bytes), 0);
    data = static_cast<char*>(mmap(nullptr, static_cast<size_t>(size_bytes), PROT_READ | PROT_WRITE,
                                   MAP_SHARED, descriptor, 0));
    EXPECT_NE(data, MAP_FAILED);
    size_ = static_cast<size_t>(size_bytes);
    close(descriptor);
  }
  ~Object() {
    munmap(data, size_);
    shm_unlink(("/" + key).c_str());
  }
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;

  const std::string key;
  char* data = nullptr;

 private:
  size_t size_ = 0;
};

class RegionStoreTest : public testing::Test {
 protected:
  RegionStore::Registration Of(const Object& object, const std::string& name = "r") {
    RegionStore::Registration registration;
    registration.name = name;
    registration.byte_size = kBytes;
    registration.shm_key = object.key;
    registration.lease = absl::Seconds(10);
    return registration;
  }
  static std::string FieldOf(const absl::Status& status) { return GetErrorDetails(status).subject; }

  const std::unique_ptr<Backend> backend_ = *CreateCpuBackend({.num_threads = 1});
  absl::Time now_ = absl::UnixEpoch();
  RegionStore store_{{.allow_shm = true,
                      .allow_cuda_ipc = true,
                      .max_regions = 2,
                      .max_bytes = 2 * kBytes,
                      .now = [this] { return now_; }},
                     {backend_.get()}};
};

TEST_F(RegionStoreTest, BytesAreShared) {
  const Object object("shared");
  RegionStore::Registration registration = Of(object);
  registration.writable = true;
  const auto info = store_.Register(registration);
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_NE(info->generation, 0U);
  EXPECT_LT(info->generation, uint64_t{1} << 63);
  object.data[5000] = 'a';
  const auto part = store_.Find("r", info->generation, 5000, 2, /*writable=*/true, "f");
  ASSERT_TRUE(part.ok()) << part.status();
  EXPECT_EQ(static_cast<char>(part->data[0]), 'a');
  part->data[1] = std::byte{'b'};
  EXPECT_EQ(object.data[5001], 'b');
}

TEST_F(RegionStoreTest, BoundsAreThoseOfTheRealObject) {
  const Object object("bounds");
  RegionStore::Registration registration = Of(object);
  registration.byte_size = kBytes + 1;
  EXPECT_EQ(FieldOf(store_.Register(registration).status()), "byte_size");
  registration.byte_size = kBytes;
  registration.offset_bytes = 1 << 12;
  EXPECT_EQ(FieldOf(store_.Register(registration).status()), "byte_size");
  registration.offset_bytes = 100;
  EXPECT_EQ(FieldOf(store_.Register(registration).status()), "posix_shm.offset_bytes");
  registration.offset_bytes = int64_t{1} << 62;
  EXPECT_EQ(FieldOf(store_.Register(registration).status()), "posix_shm.offset_bytes");
  registration.offset_bytes = 0;
  for (const char* key : {"../passwd", "a/b", "", "a b"}) {
    registration.shm_key = key;
    EXPECT_FALSE(store_.Register(registration).ok()) << key;
  }
  registration.shm_key = "dynsplit-regions-test-none";
  EXPECT_EQ(store_.Register(registration).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(RegionStoreTest, PartsLieWithinTheRegion) {
  const Object object("parts");
  const auto info = store_.Register(Of(object));
  ASSERT_TRUE(info.ok()) << info.status();
  const auto find = [&](int64_t offset, int64_t size, bool writable = false) {
    return store_.Find("r", info->generation, offset, size, writable, "f").status();
  };
  EXPECT_TRUE(find(0, kBytes).ok());
  EXPECT_TRUE(find(kBytes, 0).ok());
  for (const auto& [offset, size] : std::initializer_list<std::pair<int64_t, int64_t>>{
           {1, kBytes}, {kBytes + 1, 0}, {-1, 1}, {0, -1}, {INT64_MAX, INT64_MAX}}) {
    EXPECT_EQ(FieldOf(find(offset, size)), "f.offset_bytes") << offset << " " << size;
  }
  EXPECT_EQ(FieldOf(find(0, 1, /*writable=*/true)), "f.name");
  EXPECT_EQ(store_.Find("r", info->generation ^ 1, 0, 1, false, "f").status().code(),
            absl::StatusCode::kNotFound);
  EXPECT_EQ(store_.Find("q", info->generation, 0, 1, false, "f").status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(RegionStoreTest, TheSameObjectRenewsAndAnotherIsRefused) {
  std::optional<Object> object(std::in_place, "again");
  const auto first = store_.Register(Of(*object));
  ASSERT_TRUE(first.ok()) << first.status();
  now_ += absl::Seconds(9);
  const auto again = store_.Register(Of(*object));
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->generation, first->generation);
  EXPECT_EQ(again->lease_left, absl::Seconds(10));
  RegionStore::Registration other = Of(*object);
  other.writable = true;
  EXPECT_EQ(store_.Register(other).status().code(), absl::StatusCode::kAlreadyExists);
  const std::string key = object->key;
  object.reset();  // the name now leads to another object
  const Object successor("again");
  ASSERT_EQ(successor.key, key);
  EXPECT_EQ(store_.Register(Of(successor)).status().code(), absl::StatusCode::kAlreadyExists);
}

TEST_F(RegionStoreTest, LeasesEnd) {
  const Object object("lease");
  const auto info = store_.Register(Of(object));
  ASSERT_TRUE(info.ok()) << info.status();
  const auto used = store_.Find("r", info->generation, 0, 1, false, "f");
  ASSERT_TRUE(used.ok());
  ASSERT_EQ(store_.List().size(), 1U);
  EXPECT_EQ(store_.List()[0].num_users, 1);
  now_ += absl::Seconds(10);
  EXPECT_EQ(store_.Find("r", info->generation, 0, 1, false, "f").status().code(),
            absl::StatusCode::kNotFound);
  EXPECT_TRUE(store_.List().empty());
  store_.Sweep();
  object.data[0] = 'x';  // still mapped for its user
  EXPECT_EQ(static_cast<char>(used->data[0]), 'x');
  const auto next = store_.Register(Of(object));
  ASSERT_TRUE(next.ok()) << next.status();
  EXPECT_NE(next->generation, info->generation);
}

TEST_F(RegionStoreTest, Quotas) {
  const Object object("quota");
  ASSERT_TRUE(store_.Register(Of(object, "a")).ok());
  ASSERT_TRUE(store_.Register(Of(object, "b")).ok());
  const absl::Status status = store_.Register(Of(object, "c")).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(GetErrorDetails(status).retry_after_ms.has_value());
  EXPECT_TRUE(store_.Unregister("a", 0).ok());
  EXPECT_EQ(store_.Unregister("a", 0).code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(store_.Register(Of(object, "c")).ok());
}

TEST_F(RegionStoreTest, OwnersTakeTheirRegionsAlong) {
  const Object object("owned");
  const auto owner = store_.Attach();
  ASSERT_TRUE(owner.ok()) << owner.status();
  EXPECT_EQ(owner->size(), 16U);
  RegionStore::Registration registration = Of(object, "a");
  registration.owner = *owner;
  const auto info = store_.Register(registration);
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_TRUE(info->owned);
  EXPECT_EQ(info->kind, RegionStore::Kind::kPosixShm);
  EXPECT_EQ(store_.Register(Of(object, "a")).status().code(), absl::StatusCode::kAlreadyExists);
  ASSERT_TRUE(store_.Register(Of(object, "b")).ok());
  const auto used = store_.Find("a", info->generation, 0, 1, false, "f");
  ASSERT_TRUE(used.ok());
  (void)store_.Detach(*owner);
  EXPECT_EQ(store_.Find("a", info->generation, 0, 1, false, "f").status().code(),
            absl::StatusCode::kNotFound);
  object.data[0] = 'x';  // still mapped for its user
  EXPECT_EQ(static_cast<char>(used->data[0]), 'x');
  ASSERT_EQ(store_.List().size(), 1U);
  EXPECT_EQ(store_.List()[0].name, "b");
  EXPECT_EQ(store_.Register(registration).status().code(), absl::StatusCode::kNotFound);
  (void)store_.Detach(*owner);  // once more is nothing
  EXPECT_EQ(store_.List().size(), 1U);
}

TEST_F(RegionStoreTest, OwnersHaveAQuotaAndLeasesStillEnd) {
  RegionStore store({.allow_shm = true, .max_owners = 1, .now = [this] { return now_; }},
                    *backend_);
  const auto owner = store.Attach();
  ASSERT_TRUE(owner.ok());
  EXPECT_EQ(store.Attach().status().code(), absl::StatusCode::kResourceExhausted);
  const Object object("owner-lease");
  RegionStore::Registration registration = Of(object);
  registration.owner = *owner;
  ASSERT_TRUE(store.Register(registration).ok());
  now_ += absl::Seconds(10);
  EXPECT_TRUE(store.List().empty());
  (void)store.Detach(*owner);
  EXPECT_TRUE(store.Attach().ok());
}

TEST_F(RegionStoreTest, MemFds) {
  const auto pass = [](PassedFiles& files, char token, int more_seals) {
    FileDescriptor file(memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    EXPECT_EQ(ftruncate(file.number(), kBytes), 0);
    EXPECT_EQ(
        fcntl(file.number(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL | more_seals),
        0);
    EXPECT_TRUE(files.Add({.token = std::string(16, token), .file = std::move(file)}).ok());
  };
  PassedFiles files;
  RegionStore store({.allow_shm = true, .files = &files}, *backend_);
  RegionStore::Registration registration;
  registration.name = "m";
  registration.byte_size = kBytes;
  registration.writable = true;
  registration.file_token = std::string(16, 'a');
  EXPECT_EQ(store.Register(registration).status().code(), absl::StatusCode::kNotFound);
  pass(files, 'a', 0);
  registration.byte_size = kBytes + 1;
  EXPECT_EQ(FieldOf(store.Register(registration).status()), "byte_size");
  registration.byte_size = kBytes;
  const auto info = store.Register(registration);
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->kind, RegionStore::Kind::kMemFd);
  EXPECT_EQ(files.size(), 0) << "taken";
  const auto again = store.Register(registration);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->generation, info->generation);
  // Sealed against writing: for reading only.
  pass(files, 'w', F_SEAL_FUTURE_WRITE);
  registration.name = "w";
  registration.file_token = std::string(16, 'w');
  EXPECT_EQ(store.Register(registration).status().code(), absl::StatusCode::kFailedPrecondition);
  registration.writable = false;
  EXPECT_TRUE(store.Register(registration).ok());
  EXPECT_EQ(store_.Register(registration).status().code(), absl::StatusCode::kUnimplemented)
      << "no side socket";
}

TEST_F(RegionStoreTest, WhatIsSwitchedOffIsUnimplemented) {
  RegionStore off({}, {backend_.get()});
  const Object object("off");
  EXPECT_FALSE(off.enabled());
  EXPECT_EQ(off.Register(Of(object)).status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(off.Find("r", 1, 0, 1, false, "f").status().code(), absl::StatusCode::kUnimplemented);
  RegionStore::Registration device;
  device.name = "d";
  device.byte_size = 1;
  device.ipc_handle = std::string(64, 'h');
  device.device_uuid = std::string(16, 'u');
  EXPECT_EQ(store_.Register(device).status().code(), absl::StatusCode::kUnimplemented);
}

}  // namespace
}  // namespace dynsplit
