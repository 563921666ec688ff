//! Counts the parameters of a kernel's entry point in its text.
//!
//! The driver takes arguments as an array of pointers without a length: one too few, and it reads whatever
//! lies behind. A count in the text catches that at the price of one scan per source. It is no parser: an
//! entry point that comes out of a macro, or has preprocessor lines among its parameters, is not counted.

/// Number of parameters of the function `name`, or `None` where the text does not show it plainly.
pub(crate) fn parameters(text: &str, name: &str) -> Option<usize> {
    let text = without_comments(text);
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let list = text.match_indices(name).find_map(|(at, _)| {
        let starts = !text[..at].ends_with(is_word);
        let global = text[..at].rfind(['}', ';', '{']).map_or(&text[..at], |end| &text[end..at]).contains("__global__");
        let rest = text[at + name.len()..].trim_start().strip_prefix('(')?;
        (starts && global).then_some(rest)
    })?;
    let (mut depth, mut commas, mut end) = (0_usize, 0, None);
    for (at, c) in list.char_indices() {
        match c {
            '(' | '[' | '{' | '<' => depth += 1,
            ')' if depth == 0 => {
                end = Some(at);
                break;
            }
            ')' | ']' | '}' | '>' => depth = depth.checked_sub(1)?,
            ',' if depth == 0 => commas += 1,
            '#' => return None,
            _ => {}
        }
    }
    match list[..end?].trim() {
        "" | "void" => Some(0),
        _ => Some(commas + 1),
    }
}

fn without_comments(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("//").into_iter().chain(rest.find("/*")).min() {
        out.push_str(&rest[..at]);
        out.push(' ');
        let (end, skip) = match rest[at..].starts_with("//") {
            true => ("\n", 0),
            false => ("*/", 2),
        };
        // The first two bytes open the comment and can't close it.
        rest = rest[at + 2..].find(end).map_or("", |length| &rest[at + 2 + length + skip..]);
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_counted() {
        for (text, expected) in [
            ("extern \"C\" __global__ void k() {}", Some(0)),
            ("extern \"C\" __global__ void k(void) {}", Some(0)),
            ("extern \"C\" __global__ void __launch_bounds__(256, 1) k(const float* x, P p) {}", Some(2)),
            ("__global__ void\nk\n(float *x, // a, b)\n /* c, */ float *y) {}", Some(2)),
            (
                "__device__ int k2(int a) { return a; }\nextern \"C\" __global__ void k(A<1, 2> a, float (*f)[2]) {}",
                Some(2),
            ),
            ("// k(a, b, c)\nextern \"C\" __global__ void k(float* x) { k2(1, 2); }", Some(1)),
            ("extern \"C\" __global__ void k(float* x\n#ifdef Y\n, float* y\n#endif\n) {}", None),
            ("KERNEL(k, float* x) {}", None),
            ("__global__ void other(float* x) {}", None),
            ("__global__ void k(float* x", None),
            ("", None),
        ] {
            assert_eq!(parameters(text, "k"), expected, "{text}");
        }
    }

    #[test]
    fn comments_go_and_lines_stay() {
        assert_eq!(without_comments("a//b\nc/*d\n*/e/*/f*/g//h"), "a \nc e g ");
        assert_eq!(without_comments("a /* open"), "a  ");
    }
}
