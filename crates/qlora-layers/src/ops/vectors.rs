//! Loops over slices that are compiled for AVX2 and AVX-512 beside the baseline. Without fused multiply-adds, and with sums
//! in an order of their own, all give the same bits.

/// Defines a function that runs `$body`, which has to be `#[inline(always)]`, in the widest vectors that the processor has.
macro_rules! for_processor {
    (
        $(#[$meta:meta])*
        $visibility:vis fn $name:ident $(<$type:ident: $bound:path>)? ($($argument:ident: $of:ty),* $(,)?) $(-> $out:ty)? = $body:ident
    ) => {
        $(#[$meta])*
        $visibility fn $name $(<$type: $bound>)? ($($argument: $of),*) $(-> $out)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512 $(<$type: $bound>)? ($($argument: $of),*) $(-> $out)? {
                    $body($($argument),*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2 $(<$type: $bound>)? ($($argument: $of),*) $(-> $out)? {
                    $body($($argument),*)
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the processor has these features, as just checked.
                    return unsafe { avx512($($argument),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has AVX2, as just checked.
                    return unsafe { avx2($($argument),*) };
                }
            }
            $body($($argument),*)
        }
    };
}

pub(super) use for_processor;

/// Running sums of a loop.
pub(super) const LANES: usize = 16;
/// The sums themselves.
pub(super) type Lanes = [f32; LANES];

/// The sum of the lanes, by halves.
#[inline(always)]
pub(super) fn joined(lanes: &Lanes) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
    let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

/// The largest of the values and `most`; those that are no numbers are passed over.
#[inline(always)]
pub(super) fn largest(most: f32, values: &[f32]) -> f32 {
    let mut lanes = [most; LANES];
    let (whole, rest) = values.as_chunks::<LANES>();
    for values in whole {
        for i in 0..LANES {
            lanes[i] = lanes[i].max(values[i]);
        }
    }
    rest.iter().chain(&lanes).fold(most, |most, value| most.max(*value))
}
