// SPDX-License-Identifier: Apache-2.0
//
// Scalar conversions between float and the storage types. The definition all backends follow;
// round to nearest even, fp8 saturates to the largest finite value (448, 57344), NaN stays NaN.
#pragma once

#include <cstdint>

namespace dynsplit {

float BFloat16ToFloat(uint16_t bits);
uint16_t FloatToBFloat16(float value);
float Float16ToFloat(uint16_t bits);
uint16_t FloatToFloat16(float value);
float Float8E4M3ToFloat(uint8_t code);
uint8_t FloatToFloat8E4M3(float value);
float Float8E5M2ToFloat(uint8_t code);
uint8_t FloatToFloat8E5M2(float value);

}  // namespace dynsplit
