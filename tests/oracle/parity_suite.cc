// SPDX-License-Identifier: Apache-2.0
#include "tests/oracle/parity_suite.h"

#include <gtest/gtest.h>

#include <utility>

namespace dynsplit::oracle {
namespace {

using Check = std::function<void(Backend&)>;

class ParityTest : public testing::Test {
 public:
  ParityTest(BackendFactory backend, Check check)
      : backend_(std::move(backend)), check_(std::move(check)) {}

  void TestBody() override {
    Backend* backend = backend_();
    if (backend == nullptr) GTEST_SKIP() << "no such device here";
    check_(*backend);
  }

 private:
  BackendFactory backend_;
  Check check_;
};

struct NamedCheck {
  const char* name;
  void (*check)(Backend&, const ParityShape&);
};

constexpr NamedCheck kChecks[] = {
    {"ScoreWindow", CheckScoreWindow},
    {"ScoreKeys", CheckScoreKeys},
    {"ReduceRows", CheckReduceRows},
    {"ReduceBlocks", CheckReduceBlocks},
    {"SummarizeBlocks", CheckSummarizeBlocks},
    {"BlockBound", CheckBlockBound},
    {"ScoreBlocks", CheckScoreBlocks},
    {"SelectBlocks", CheckSelectBlocks},
    {"ScoreTokens", CheckScoreTokens},
    {"SelectCandidates", CheckSelectCandidates},
    {"AttendTokens", CheckAttendTokens},
    {"RefreshRows", CheckRefreshRows},
    {"ResidentMemory", CheckResidentMemory},
    {"SelectTokens", CheckSelectTokens},
    {"SelectAdversarial", CheckSelectAdversarial},
    {"GatherPages", CheckGatherPages},
    {"MeasureAttention", CheckMeasureAttention},
    {"MeasureSpans", CheckMeasureSpans},
    {"SegmentTokens", CheckSegmentTokens},
    {"CheckFinite", CheckCheckFinite},
};

struct NamedBackendCheck {
  const char* name;
  void (*check)(Backend&);
};

constexpr NamedBackendCheck kBackendChecks[] = {
    {"Copies", CheckCopies},
    {"ResidentLimits", CheckResidentLimits},
    {"SelectLarge", CheckSelectLarge},
    {"ReduceLong", CheckReduceLong},
    {"MeasureAttentionLong", CheckMeasureLong},
    {"SegmentLengths", CheckSegmentLengths},
};

void Register(const std::string& suite, const std::string& name, const BackendFactory& backend,
              const Check& check) {
  testing::RegisterTest(
      suite.c_str(), name.c_str(), nullptr, nullptr, __FILE__, __LINE__,
      [backend, check]() -> ParityTest* { return new ParityTest(backend, check); });
}

}  // namespace

int RegisterParityTests(const std::string& prefix, BackendFactory backend, ShapeSet shapes) {
  const std::string suite = prefix + "Parity";
  int count = 0;
  for (const NamedCheck& check : kChecks) {
    for (const ParityShape& shape : ParityShapes()) {
      if (shapes == ShapeSet::kSmall && !shape.small()) continue;
      Register(suite, std::string(check.name) + "/" + shape.name, backend,
               [check, &shape](Backend& device) { check.check(device, shape); });
      ++count;
    }
  }
  for (const NamedBackendCheck& check : kBackendChecks) {
    Register(suite, check.name, backend, check.check);
    ++count;
  }
  return count;
}

}  // namespace dynsplit::oracle
