//! The scalar oracle: the recurrence in f64, one token after the other, and its exact reverse.

/// The rows of a batch, and the heads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Tokens of each row.
    pub rows: Vec<usize>,
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values, a multiple of `key_heads`.
    pub value_heads: usize,
    /// Dimensions of a query or key.
    pub key_dim: usize,
    /// Dimensions of a value.
    pub value_dim: usize,
}

/// What the rule reads.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// `[tokens, key_heads, key_dim]`.
    pub q: &'a [f64],
    /// `[tokens, key_heads, key_dim]`.
    pub k: &'a [f64],
    /// `[tokens, value_heads, value_dim]`.
    pub v: &'a [f64],
    /// `[tokens, value_heads]`, not above 0.
    pub g: &'a [f64],
    /// `[tokens, value_heads]`.
    pub beta: &'a [f64],
}

/// What [`backward`] computes, each in the layout of what it is the gradient of.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients {
    /// Of the queries.
    pub q: Vec<f64>,
    /// Of the keys.
    pub k: Vec<f64>,
    /// Of the values.
    pub v: Vec<f64>,
    /// Of the decays.
    pub g: Vec<f64>,
    /// Of the strengths.
    pub beta: Vec<f64>,
}

/// A state `[key_dim, value_dim]` of one head.
#[derive(Clone)]
struct State {
    values: Vec<f64>,
    width: usize,
}

impl State {
    /// `Sᵀ x`.
    fn read(&self, x: &[f64]) -> Vec<f64> {
        let mut out = vec![0.0; self.width];
        for (row, x) in self.values.chunks(self.width).zip(x) {
            out.iter_mut().zip(row).for_each(|(out, s)| *out += s * x);
        }
        out
    }

    /// `S y`.
    fn apply(&self, y: &[f64]) -> Vec<f64> {
        self.values.chunks(self.width).map(|row| row.iter().zip(y).map(|(s, y)| s * y).sum()).collect()
    }

    /// `S + x yᵀ`.
    fn add(&mut self, x: &[f64], y: &[f64]) {
        for (row, x) in self.values.chunks_mut(self.width).zip(x) {
            row.iter_mut().zip(y).for_each(|(s, y)| *s += x * y);
        }
    }

    fn scale(&mut self, factor: f64) {
        self.values.iter_mut().for_each(|s| *s *= factor);
    }
}

/// Where a token's head lies in a tensor of `width` elements for each of `heads` heads.
fn place(token: usize, head: usize, heads: usize, width: usize) -> std::ops::Range<usize> {
    let start = (token * heads + head) * width;
    start..start + width
}

/// What the recurrence goes through at a token.
struct Step {
    /// The decayed state.
    decayed: State,
    /// `v - Sᵀ k`.
    missing: Vec<f64>,
    /// The state after the token.
    after: State,
}

impl Batch {
    /// The first token of each row, and its tokens.
    fn spans(&self) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
        self.rows.iter().scan(0, |start, len| {
            *start += len;
            Some(*start - len..*start)
        })
    }

    fn key_head(&self, head: usize) -> usize {
        head / (self.value_heads / self.key_heads)
    }

    fn steps(&self, inputs: Inputs<'_>, tokens: std::ops::Range<usize>, head: usize) -> Vec<Step> {
        let mut state = State { values: vec![0.0; self.key_dim * self.value_dim], width: self.value_dim };
        let step = |token: usize| {
            let k = &inputs.k[place(token, self.key_head(head), self.key_heads, self.key_dim)];
            let v = &inputs.v[place(token, head, self.value_heads, self.value_dim)];
            let at = token * self.value_heads + head;
            state.scale(inputs.g[at].exp());
            let decayed = state.clone();
            let missing: Vec<f64> = v.iter().zip(decayed.read(k)).map(|(v, known)| v - known).collect();
            let update: Vec<f64> = missing.iter().map(|m| m * inputs.beta[at]).collect();
            state.add(k, &update);
            Step { decayed, missing, after: state.clone() }
        };
        tokens.map(step).collect()
    }
}

/// The outputs, `[tokens, value_heads, value_dim]`, and the state behind each row's last token,
/// `[rows, value_heads, key_dim, value_dim]`.
pub fn forward(inputs: Inputs<'_>, batch: &Batch) -> (Vec<f64>, Vec<f64>) {
    let (mut out, mut states) = (vec![0.0; inputs.v.len()], Vec::new());
    for tokens in batch.spans() {
        for head in 0..batch.value_heads {
            let steps = batch.steps(inputs, tokens.clone(), head);
            for (step, token) in steps.iter().zip(tokens.clone()) {
                let q = &inputs.q[place(token, batch.key_head(head), batch.key_heads, batch.key_dim)];
                out[place(token, head, batch.value_heads, batch.value_dim)].copy_from_slice(&step.after.read(q));
            }
            let zeros = || vec![0.0; batch.key_dim * batch.value_dim];
            states.extend(steps.last().map_or_else(zeros, |step| step.after.values.clone()));
        }
    }
    (out, states)
}

/// The gradients for `d_out`, the gradient of [`forward`]'s outputs.
pub fn backward(inputs: Inputs<'_>, d_out: &[f64], batch: &Batch) -> Gradients {
    let zeros = |like: &[f64]| vec![0.0; like.len()];
    let mut grads = Gradients {
        q: zeros(inputs.q),
        k: zeros(inputs.k),
        v: zeros(inputs.v),
        g: zeros(inputs.g),
        beta: zeros(inputs.beta),
    };
    let add = |sum: &mut [f64], part: &[f64]| sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for tokens in batch.spans() {
        for head in 0..batch.value_heads {
            let steps = batch.steps(inputs, tokens.clone(), head);
            let mut d = State { values: vec![0.0; batch.key_dim * batch.value_dim], width: batch.value_dim };
            for (step, token) in steps.iter().zip(tokens.clone()).rev() {
                let keys = place(token, batch.key_head(head), batch.key_heads, batch.key_dim);
                let values = place(token, head, batch.value_heads, batch.value_dim);
                let at = token * batch.value_heads + head;
                let (q, k, beta) = (&inputs.q[keys.clone()], &inputs.k[keys.clone()], inputs.beta[at]);
                let d_o = &d_out[values.clone()];
                // o = Sᵀ q
                add(&mut grads.q[keys.clone()], &step.after.apply(d_o));
                d.add(q, d_o);
                // S = decayed + k (beta missing)ᵀ
                let update: Vec<f64> = step.missing.iter().map(|m| m * beta).collect();
                add(&mut grads.k[keys.clone()], &d.apply(&update));
                let d_update = d.read(k);
                grads.beta[at] += dot(&d_update, &step.missing);
                let d_missing: Vec<f64> = d_update.iter().map(|d| d * beta).collect();
                add(&mut grads.v[values], &d_missing);
                // missing = v - decayedᵀ k
                let d_known: Vec<f64> = d_missing.iter().map(|d| -d).collect();
                add(&mut grads.k[keys], &step.decayed.apply(&d_known));
                d.add(k, &d_known);
                // decayed = exp(g) S
                grads.g[at] += dot(&d.values, &step.decayed.values);
                d.scale(inputs.g[at].exp());
            }
        }
    }
    grads
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_are_the_slopes_of_the_outputs() {
        let batch = Batch { rows: vec![3, 1, 4], key_heads: 1, value_heads: 2, key_dim: 3, value_dim: 2 };
        let tokens: usize = batch.rows.iter().sum();
        let noise =
            |seed: u64, len: usize| -> Vec<f64> { test_support::noise(seed, len).into_iter().map(f64::from).collect() };
        let values: [Vec<f64>; 5] = [
            noise(1, 3 * tokens),
            noise(2, 3 * tokens),
            noise(3, 4 * tokens),
            noise(4, 2 * tokens).iter().map(|g| -g.abs()).collect(),
            noise(5, 2 * tokens).iter().map(|b| b.abs()).collect(),
        ];
        let d_out = noise(6, 4 * tokens);
        let inputs = |[q, k, v, g, beta]: &[Vec<f64>; 5]| -> f64 {
            let inputs = Inputs { q, k, v, g, beta };
            forward(inputs, &batch).0.iter().zip(&d_out).map(|(o, d)| o * d).sum()
        };
        let [q, k, v, g, beta] = &values;
        let grads = backward(Inputs { q, k, v, g, beta }, &d_out, &batch);
        let grads = [grads.q, grads.k, grads.v, grads.g, grads.beta];
        for (which, grads) in grads.iter().enumerate() {
            for (i, grad) in grads.iter().enumerate() {
                let at = |step: f64| {
                    let mut moved = values.clone();
                    moved[which][i] += step;
                    inputs(&moved)
                };
                // The second difference's error is the cube of the step times slopes near 1.
                let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!((slope - grad).abs() < 1e-8, "input {which}, element {i}: {grad}, slope {slope}");
            }
        }
    }
}
