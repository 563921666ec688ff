//! A module with its path, as checkpoints and adapters name it.

/// A module with its path in the model.
#[derive(Clone, Debug)]
pub(crate) struct Named<T> {
    pub path: String,
    pub module: T,
}

impl<T> Named<T> {
    pub fn pair(&self) -> (String, &T) {
        (self.path.clone(), &self.module)
    }

    pub fn pair_mut(&mut self) -> (String, &mut T) {
        (self.path.clone(), &mut self.module)
    }
}
