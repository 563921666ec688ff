//! Whether the output head is the embedding table, by the weights: a configuration may say so of a checkpoint that holds two.

use super::ModelConfig;
use adapter_io::Checkpoint;

impl ModelConfig {
    /// Takes the head for a weight of its own where the checkpoint has one that is not the embedding table, as transformers 5 does.
    pub(super) fn untie_by_weights(&mut self, checkpoint: &Checkpoint) {
        if !self.tie_word_embeddings {
            return;
        }
        let differs = self.roots.iter().find_map(|root| {
            let names = [root.below(".embed_tokens.weight"), format!("{}.weight", root.head)];
            let [embed, head] = names.each_ref().map(|name| checkpoint.get(name));
            let (embed, head) = (embed?, head?);
            let differs = (embed.dtype, &embed.shape) != (head.dtype, &head.shape) || embed.data != head.data;
            names.iter().for_each(|name| checkpoint.release(name));
            differs.then(|| names[1].clone())
        });
        if let Some(head) = differs {
            self.tie_word_embeddings = false;
            self.notes.push(format!(
                "{}: `tie_word_embeddings` is true, and the checkpoint's `{head}` is not the embedding table: it is the output head",
                self.path.display()
            ));
        }
    }
}
