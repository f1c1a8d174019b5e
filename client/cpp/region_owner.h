// SPDX-License-Identifier: Apache-2.0
//
// Binds regions to this process: while the object lives, so do the regions registered with its
// token (and their leases renewed); when it goes, or the process dies, the server drops them at
// once.
//
//     auto owner = client->AttachRegionOwner();
//     auto request = memory->Registration("step", /*writable=*/true);
//     request.set_owner((*owner)->token());
//     auto region = client->RegisterRegion(request);
#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/support/client_callback.h>

#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "dynsplit/v1/memory.grpc.pb.h"

namespace dynsplit {

// Thread-safe.
class RegionOwner final : private grpc::ClientBidiReactor<v1::AttachRequest, v1::AttachResponse> {
 public:
  // DEADLINE_EXCEEDED where the server does not answer in time.
  static absl::StatusOr<std::unique_ptr<RegionOwner>> Attach(
      const std::shared_ptr<grpc::Channel>& channel, absl::Duration timeout);
  ~RegionOwner() override;
  RegionOwner(const RegionOwner&) = delete;
  RegionOwner& operator=(const RegionOwner&) = delete;

  // For RegisterRegionRequest.owner.
  const std::string& token() const { return token_; }
  // False once the server, or the connection to it, is gone, and with it the regions.
  bool attached() const;

 private:
  explicit RegionOwner(const std::shared_ptr<grpc::Channel>& channel)
      : stub_(v1::Memory::NewStub(channel)) {}
  // Starts the call; returns when the token is here.
  absl::Status Start(absl::Duration timeout);
  void OnReadDone(bool ok) override;
  void OnDone(const grpc::Status& status) override;

  const std::unique_ptr<v1::Memory::Stub> stub_;
  std::string token_;            // constant after Attach
  grpc::ClientContext context_;  // self-synchronised
  v1::AttachResponse response_;  // gRPC's while a read is under way

  mutable absl::Mutex mu_;
  bool answered_ ABSL_GUARDED_BY(mu_) = false;
  bool done_ ABSL_GUARDED_BY(mu_) = true;  // no call under way
  grpc::Status status_ ABSL_GUARDED_BY(mu_);
};

}  // namespace dynsplit
