//! What kind of tensor each trained parameter is: learning rates and weight decay go by it.

use crate::decoder::Decoder;

/// What a trained parameter is to the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ParameterKind {
    /// The factor of an adapter that reads a layer's input, PEFT's `lora_A`.
    LoraA,
    /// The factor that writes its output, PEFT's `lora_B`.
    LoraB,
    /// Of the embedding table or the output head: an adapter of the table, a copy trained in full, rows of single tokens.
    Embedding,
    /// The weight of another layer that is trained in full.
    Matrix,
    /// A norm's weight, a bias, a magnitude of DoRA.
    Vector,
}

impl ParameterKind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::LoraA, Self::LoraB, Self::Embedding, Self::Matrix, Self::Vector];

    /// By the name of the part; a norm's `weight` is its caller's to tell.
    fn of_part(name: &str) -> Self {
        match name.rsplit('.').next() {
            Some("lora_a") => Self::LoraA,
            Some("lora_b") => Self::LoraB,
            Some("weight") => Self::Matrix,
            _ => Self::Vector,
        }
    }
}

impl Decoder {
    /// The kind of each of the [`parameters`](Self::parameters), in their order.
    pub fn parameter_kinds(&self) -> Vec<ParameterKind> {
        let norms: Vec<String> =
            self.norms().filter(|(_, norm)| norm.trained.is_some()).map(|(path, _)| format!("{path}.weight")).collect();
        let of = |name: &str| match norms.iter().any(|norm| norm == name) {
            true => ParameterKind::Vector,
            false => ParameterKind::of_part(name),
        };
        let embedding =
            self.embedding_parameters().into_iter().map(|(name, _)| match name.ends_with("lora_magnitude") {
                true => ParameterKind::Vector,
                false => ParameterKind::Embedding,
            });
        let blocks = self.blocks.iter().flat_map(|block| block.parameters().into_iter().map(|(name, _)| of(&name)));
        let head = self.head_parameters().into_iter().map(|(name, _)| match of(&name) {
            // Rows of single tokens have a part's name of their own.
            ParameterKind::Matrix => ParameterKind::Embedding,
            _ if name.ends_with(super::parameters::TOKEN_ROWS) => ParameterKind::Embedding,
            kind => kind,
        });
        embedding.chain(blocks).chain(head).collect()
    }
}
