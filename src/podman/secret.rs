//! Secrets: whether they are there is all that is ever asked.

use super::client::Client;
use super::error::Result;
use super::id::check_name;
use super::request::{Purpose, Upload};

impl Client {
    /// Whether there is a secret of this name. Its value is not read.
    ///
    /// # Errors
    /// [`super::Error::Name`] if there can be none; else when Podman cannot be asked.
    pub async fn secret_exists(&self, name: &str) -> Result<bool> {
        check_name("secret", name)?;
        // podman-api has no call for `exists`.
        let path = format!("/secrets/{name}/exists");
        let call = self.ask(Purpose::new("look for", format!("secret {name}")), &path);
        match self.socket.send(call, Upload::empty()).await {
            Ok(answer) => answer.done().await.map(|()| true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }
}
