// SPDX-License-Identifier: Apache-2.0
//
// Every operation on every shape against the oracle, for any backend:
//
//     const int registered = oracle::RegisterParityTests("Cuda", [] { return TheBackend(); });
//
// at namespace scope of a test file, linked with gtest_main. Tests are named
// "<prefix>Parity.<Operation>/<shape>". A null backend skips them.
//
// Inputs are uploaded with AllocateHost and ToDevice; outputs start as 0xA5 bytes with a guard
// behind them, so that what an operation forgets to write, or writes beyond, fails the test.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "server/pipeline/backend.h"
#include "tests/oracle/shapes.h"

namespace dynsplit::oracle {

using BackendFactory = std::function<Backend*()>;

enum class ShapeSet : uint8_t { kAll, kSmall };  // ParityShape::small

// Returns the number of tests registered.
int RegisterParityTests(const std::string& prefix, BackendFactory backend,
                        ShapeSet shapes = ShapeSet::kAll);

// The checks behind them; failures are reported through GoogleTest.
void CheckScoreWindow(Backend& backend, const ParityShape& shape);
void CheckScoreKeys(Backend& backend, const ParityShape& shape);
void CheckReduceRows(Backend& backend, const ParityShape& shape);
void CheckReduceBlocks(Backend& backend, const ParityShape& shape);
void CheckSummarizeBlocks(Backend& backend, const ParityShape& shape);
void CheckBlockBound(Backend& backend, const ParityShape& shape);
void CheckScoreBlocks(Backend& backend, const ParityShape& shape);
void CheckScoreTokens(Backend& backend, const ParityShape& shape);
void CheckSelectTokens(Backend& backend, const ParityShape& shape);
void CheckSelectAdversarial(Backend& backend, const ParityShape& shape);
void CheckSelectBlocks(Backend& backend, const ParityShape& shape);
void CheckSelectCandidates(Backend& backend, const ParityShape& shape);
void CheckAttendTokens(Backend& backend, const ParityShape& shape);
void CheckRefreshRows(Backend& backend, const ParityShape& shape);
void CheckGatherPages(Backend& backend, const ParityShape& shape);
void CheckMeasureAttention(Backend& backend, const ParityShape& shape);
void CheckMeasureSpans(Backend& backend, const ParityShape& shape);
void CheckSegmentTokens(Backend& backend, const ParityShape& shape);
void CheckCheckFinite(Backend& backend, const ParityShape& shape);
void CheckResidentMemory(Backend& backend, const ParityShape& shape);
// Without a shape: "<prefix>Parity.<Name>".
void CheckCopies(Backend& backend);
void CheckResidentLimits(Backend& backend);
void CheckSelectLarge(Backend& backend);
void CheckReduceLong(Backend& backend);
void CheckMeasureLong(Backend& backend);
void CheckSegmentLengths(Backend& backend);

// GatherPages, CheckFinite and SummarizeBlocks on more than 2^31 elements (needs 5 GiB). Byte
// offsets and element counts that are 32 bits wide anywhere fail here.
void CheckBeyondTwoGibiElements(Backend& backend);

}  // namespace dynsplit::oracle
