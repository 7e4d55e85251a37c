//! The interface for applications: a builder in the style of mistral.rs, and a model with mistral.rs's own methods.

mod adapters;
mod builder;
mod exchange;
mod model;
mod request;
mod served;
mod stream;

pub use builder::MonteCloraModelBuilder;
pub use model::MonteCloraModel;
pub use served::Turn;
pub use stream::MonteCloraStream;
