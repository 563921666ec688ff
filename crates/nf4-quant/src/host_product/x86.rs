//! AVX2 and AVX-512.

use std::arch::x86_64::*;

use half::bf16;

use super::lanes::{Codes, Group, Halves, Lanes};

/// AVX-512: a table in one register, a group of weights in two.
pub(super) struct Avx512;

impl Lanes for Avx512 {
    type Table = __m512;
    type Weights = [__m512; 2];
    type Sum = [__m512; 2];

    #[inline(always)]
    unsafe fn table(values: &[f32; 16]) -> Self::Table {
        // SAFETY: the caller has AVX-512F; the array holds a register's elements.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn scaled(table: Self::Table, absmax: f32) -> Self::Table {
        // SAFETY: the caller has AVX-512F.
        unsafe { _mm512_mul_ps(table, _mm512_set1_ps(absmax)) }
    }

    #[inline(always)]
    unsafe fn decode(codes: &Codes, table: Self::Table) -> Self::Weights {
        // SAFETY: the caller has AVX-512F; the array holds the 16 bytes that are read.
        unsafe {
            // One byte a lane. The permutation looks at four bits.
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
            let even = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), table);
            [even, _mm512_permutexvar_ps(bytes, table)]
        }
    }

    #[inline(always)]
    unsafe fn load(weights: &Group) -> Self::Weights {
        // SAFETY: the caller has AVX-512F; a group has 32 elements.
        unsafe { [_mm512_loadu_ps(weights.as_ptr()), _mm512_loadu_ps(weights[16..].as_ptr())] }
    }

    #[inline(always)]
    unsafe fn widen(halves: &Halves) -> Self::Weights {
        let halves = halves.as_ptr().cast::<u16>();
        // SAFETY: the caller has AVX-512F; a group has 32 elements, which are read sixteen at a time.
        unsafe {
            let first = _mm512_cvtepu16_epi32(_mm256_loadu_si256(halves.cast()));
            let second = _mm512_cvtepu16_epi32(_mm256_loadu_si256(halves.add(16).cast()));
            let (first, second) = (_mm512_slli_epi32::<16>(first), _mm512_slli_epi32::<16>(second));
            [_mm512_castsi512_ps(first), _mm512_castsi512_ps(second)]
        }
    }

    #[inline(always)]
    unsafe fn store(weights: Self::Weights, to: &mut Group) {
        // SAFETY: the caller has AVX-512F; a group has 32 elements.
        unsafe {
            _mm512_storeu_ps(to.as_mut_ptr(), weights[0]);
            _mm512_storeu_ps(to[16..].as_mut_ptr(), weights[1]);
        }
    }

    #[inline(always)]
    unsafe fn zero() -> Self::Sum {
        // SAFETY: the caller has AVX-512F.
        unsafe { [_mm512_setzero_ps(); 2] }
    }

    #[inline(always)]
    unsafe fn add(sum: Self::Sum, weights: Self::Weights, x: &Group) -> Self::Sum {
        // SAFETY: the caller has AVX-512F.
        unsafe {
            let x = Self::load(x);
            [_mm512_fmadd_ps(weights[0], x[0], sum[0]), _mm512_fmadd_ps(weights[1], x[1], sum[1])]
        }
    }

    #[inline(always)]
    unsafe fn total(sum: Self::Sum) -> f32 {
        // SAFETY: the caller has AVX-512F.
        unsafe { _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1])) }
    }
}

/// AVX2 and FMA: a table in two registers, a group of weights in four.
pub(super) struct Avx2;

impl Avx2 {
    /// The values of eight codes, one a lane; higher bits of a lane are ignored.
    #[inline(always)]
    unsafe fn look_up(codes: __m256i, table: [__m256; 2]) -> __m256 {
        // SAFETY: the caller has AVX2.
        unsafe {
            // Permutations look at three bits; the fourth, moved to the sign, chooses between them.
            let (low, high) = (_mm256_permutevar8x32_ps(table[0], codes), _mm256_permutevar8x32_ps(table[1], codes));
            _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes)))
        }
    }

    #[inline(always)]
    unsafe fn widen_eight(halves: &[bf16; 8]) -> __m256 {
        // SAFETY: the caller has AVX2; the array holds the eight elements that are read.
        unsafe {
            let halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(halves.as_ptr().cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(halves))
        }
    }
}

impl Lanes for Avx2 {
    type Table = [__m256; 2];
    type Weights = [__m256; 4];
    type Sum = [__m256; 2];

    #[inline(always)]
    unsafe fn table(values: &[f32; 16]) -> Self::Table {
        // SAFETY: the caller has AVX; the array holds two registers' elements.
        unsafe { [_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values[8..].as_ptr())] }
    }

    #[inline(always)]
    unsafe fn scaled(table: Self::Table, absmax: f32) -> Self::Table {
        // SAFETY: the caller has AVX.
        unsafe {
            let absmax = _mm256_set1_ps(absmax);
            [_mm256_mul_ps(table[0], absmax), _mm256_mul_ps(table[1], absmax)]
        }
    }

    #[inline(always)]
    unsafe fn decode(codes: &Codes, table: Self::Table) -> Self::Weights {
        // SAFETY: the caller has AVX2; the array holds the 16 bytes that are read, eight at a time.
        unsafe {
            let first = _mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.as_ptr().cast()));
            let second = _mm256_cvtepu8_epi32(_mm_loadl_epi64(codes[8..].as_ptr().cast()));
            let (even, later) = (_mm256_srli_epi32::<4>(first), _mm256_srli_epi32::<4>(second));
            let (even, later) = (Self::look_up(even, table), Self::look_up(later, table));
            [even, later, Self::look_up(first, table), Self::look_up(second, table)]
        }
    }

    #[inline(always)]
    unsafe fn load(weights: &Group) -> Self::Weights {
        let (vectors, _) = weights.as_chunks::<8>();
        // SAFETY: the caller has AVX; each chunk has the eight elements that are read.
        unsafe {
            let (first, second) = (_mm256_loadu_ps(vectors[0].as_ptr()), _mm256_loadu_ps(vectors[1].as_ptr()));
            [first, second, _mm256_loadu_ps(vectors[2].as_ptr()), _mm256_loadu_ps(vectors[3].as_ptr())]
        }
    }

    #[inline(always)]
    unsafe fn widen(halves: &Halves) -> Self::Weights {
        let (vectors, _) = halves.as_chunks::<8>();
        // SAFETY: the caller has AVX2; each chunk has the eight elements that are read.
        unsafe {
            let [a, b, c, d] = [&vectors[0], &vectors[1], &vectors[2], &vectors[3]];
            [Self::widen_eight(a), Self::widen_eight(b), Self::widen_eight(c), Self::widen_eight(d)]
        }
    }

    #[inline(always)]
    unsafe fn store(weights: Self::Weights, to: &mut Group) {
        for (to, weights) in to.chunks_exact_mut(8).zip(weights) {
            // SAFETY: the caller has AVX; the slice has eight elements.
            unsafe { _mm256_storeu_ps(to.as_mut_ptr(), weights) };
        }
    }

    #[inline(always)]
    unsafe fn zero() -> Self::Sum {
        // SAFETY: the caller has AVX.
        unsafe { [_mm256_setzero_ps(); 2] }
    }

    #[inline(always)]
    unsafe fn add(sum: Self::Sum, weights: Self::Weights, x: &Group) -> Self::Sum {
        // SAFETY: the caller has AVX and FMA.
        unsafe {
            let x = Self::load(x);
            let first = _mm256_fmadd_ps(weights[2], x[2], _mm256_fmadd_ps(weights[0], x[0], sum[0]));
            [first, _mm256_fmadd_ps(weights[3], x[3], _mm256_fmadd_ps(weights[1], x[1], sum[1]))]
        }
    }

    #[inline(always)]
    unsafe fn total(sum: Self::Sum) -> f32 {
        // SAFETY: the caller has AVX.
        unsafe {
            let eight = _mm256_add_ps(sum[0], sum[1]);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
}
