//! Numbers as Python prints them, for files that Python wrote first and must stay the same byte for byte.

/// Python's `repr` of a float: the shortest digits that read back, with an exponent of at least two digits below 1e-4
/// and from 1e16 on, else with a decimal point. Non-finite values as `json.dumps` writes them.
///
/// ```
/// assert_eq!(nf4_quant::python_float(0.05), "0.05");
/// assert_eq!(nf4_quant::python_float(1e-5), "1e-05");
/// ```
pub fn python_float(value: f64) -> String {
    if value.is_nan() {
        return "NaN".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    // The shortest digits that read back, as `d.ddde-5`. Halfway between two of that length Python takes the even one,
    // as rounding to a fixed number of digits does here: 0.223407745361328125 is ...812, not ...813.
    let shortest = format!("{value:e}");
    let digits = shortest.split('e').next().unwrap_or_default().bytes().filter(u8::is_ascii_digit).count();
    let even = format!("{value:.*e}", digits.saturating_sub(1));
    let scientific = if even.parse() == Ok(value) { even } else { shortest };
    let Some((mantissa, exponent)) = scientific.split_once('e') else { return scientific };
    let Ok(exponent) = exponent.parse::<i32>() else { return scientific };
    if (-4..16).contains(&exponent) {
        let decimals = usize::try_from(digits as i32 - 1 - exponent).unwrap_or(0).max(1);
        return format!("{value:.decimals$}");
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_read_as_python_prints_them() {
        for (value, text) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (-2.0, "-2.0"),
            (0.05, "0.05"),
            (0.0001, "0.0001"),
            (0.00009999, "9.999e-05"),
            (1e-5, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (1.5e-12, "1.5e-12"),
            (1e-100, "1e-100"),
            (2.5e-120, "2.5e-120"),
            (123456789.25, "123456789.25"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (123456789012345680.0, "1.2345678901234568e+17"),
            (-1.25e22, "-1.25e+22"),
            (f64::from(0.1_f32), "0.10000000149011612"),
            // Halfway between ...12 and ...13.
            (f64::from(0.223_407_75_f32), "0.22340774536132812"),
            (f64::INFINITY, "Infinity"),
        ] {
            assert_eq!(python_float(value), text);
        }
    }
}
