// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "dynsplit/v1/info.grpc.pb.h"
#include "server/rpc/services.h"

namespace dynsplit::rpc {

class InfoService final : public v1::Info::CallbackService {
 public:
  explicit InfoService(Services& services) : services_(services) {}

  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* context,
                                          const v1::GetServerInfoRequest* request,
                                          v1::ServerInfo* response) override;
  grpc::ServerUnaryReactor* ListPolicies(grpc::CallbackServerContext* context,
                                         const v1::ListPoliciesRequest* request,
                                         v1::ListPoliciesResponse* response) override;
  grpc::ServerUnaryReactor* ListDelimiterProfiles(
      grpc::CallbackServerContext* context, const v1::ListDelimiterProfilesRequest* request,
      v1::ListDelimiterProfilesResponse* response) override;
  grpc::ServerUnaryReactor* GetDelimiterProfile(grpc::CallbackServerContext* context,
                                                const v1::GetDelimiterProfileRequest* request,
                                                v1::DelimiterProfile* response) override;
  grpc::ServerUnaryReactor* PutDelimiterProfile(grpc::CallbackServerContext* context,
                                                const v1::PutDelimiterProfileRequest* request,
                                                v1::PutDelimiterProfileResponse* response) override;
  grpc::ServerUnaryReactor* Advise(grpc::CallbackServerContext* context,
                                   const v1::AdviseRequest* request,
                                   v1::AdviseResponse* response) override;

 private:
  Services& services_;
};

}  // namespace dynsplit::rpc
