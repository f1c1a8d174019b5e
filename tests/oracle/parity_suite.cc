// SPDX-License-Identifier: Apache-2.0
#include "tests/oracle/parity_suite.h"

#include <gtest/gtest.h>

#include <utility>

namespace dynsplit::oracle {
namespace {

using Check = void (*)(Backend&, const ParityShape&);

class ParityTest : public testing::Test {
 public:
  ParityTest(BackendFactory backend, Check check, const ParityShape& shape)
      : backend_(std::move(backend)), check_(check), shape_(shape) {}

  void TestBody() override {
    Backend* backend = backend_();
    if (backend == nullptr) GTEST_SKIP() << "no such device here";
    check_(*backend, shape_);
  }

 private:
  BackendFactory backend_;
  Check check_;
  const ParityShape& shape_;
};

struct NamedCheck {
  const char* name;
  Check check;
};

constexpr NamedCheck kChecks[] = {
    {"ScoreWindow", CheckScoreWindow},
    {"ScoreKeys", CheckScoreKeys},
    {"ReduceRows", CheckReduceRows},
    {"ReduceBlocks", CheckReduceBlocks},
    {"SummarizeBlocks", CheckSummarizeBlocks},
    {"BlockBound", CheckBlockBound},
    {"ScoreBlocks", CheckScoreBlocks},
    {"SelectTokens", CheckSelectTokens},
    {"SelectAdversarial", CheckSelectAdversarial},
    {"GatherPages", CheckGatherPages},
    {"MeasureAttention", CheckMeasureAttention},
    {"MeasureSpans", CheckMeasureSpans},
    {"CheckFinite", CheckCheckFinite},
};

}  // namespace

int RegisterParityTests(const std::string& prefix, BackendFactory backend) {
  const std::string suite = prefix + "Parity";
  int count = 0;
  for (const NamedCheck& check : kChecks) {
    for (const ParityShape& shape : ParityShapes()) {
      const std::string name = std::string(check.name) + "/" + shape.name;
      testing::RegisterTest(suite.c_str(), name.c_str(), nullptr, nullptr, __FILE__, __LINE__,
                            [backend, check, &shape]() -> ParityTest* {
                              return new ParityTest(backend, check.check, shape);
                            });
      ++count;
    }
  }
  return count;
}

}  // namespace dynsplit::oracle
