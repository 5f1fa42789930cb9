//! Images: what the destination lacks, and how it gets there with the same ID.
//!
//! Podman restores a container only with the exact image ID that it was made from. Tried with
//! Podman 5.8.6, from one host to another: an image made by `podman import`, one of three layers
//! made by `podman build`, and one built with `--format docker`. As **docker-archive** all of them
//! arrived with the same ID; as oci-archive the last one got another, because its configuration is
//! rewritten. So it is docker-archive, always.
//!
//! Asked for by name, the archive holds that name; asked for by ID it holds none, and the image
//! arrives nameless. An image is asked for by ID here, so that it is the right one even if the
//! name has moved on, and named afterwards. **It has to be named:** Podman's restore looks the
//! image up by name first, and goes to a registry for three seconds or more if the name is
//! unknown, also if the ID is there.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::{SinkExt, Stream, StreamExt, TryStreamExt};
use hyper::Method;
use podman_api::opts::{ImageExportOpts, ImageTagOpts};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::client::{Client, from_api};
use super::error::Result;
use super::id::ImageId;
use super::inspect::nullable;
use super::request::{Call, Chunks, Purpose, Query, Upload, encode, owning, stalling};

/// An image in a host's storage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Its exact ID.
    pub id: ImageId,
    /// Its names with their tags, for example `localhost/web:1`; an image can have none.
    pub names: Vec<String>,
    /// Its size in bytes, unpacked.
    pub size: u64,
    /// The digest of its manifest, `sha256:...`. This is *not* the same on every host that has
    /// the image, since it depends on how the layers were packed.
    pub digest: String,
    /// The processor's architecture that it is for, in Go's words.
    pub arch: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct InspectedImage {
    id: ImageId,
    #[serde(default, deserialize_with = "nullable")]
    repo_tags: Vec<String>,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    digest: String,
    #[serde(default)]
    architecture: String,
    #[serde(default, deserialize_with = "nullable")]
    labels: BTreeMap<String, String>,
}

/// What `images/load` answers.
#[derive(Debug, Deserialize)]
pub(super) struct Loaded {
    #[serde(rename = "Names", default, deserialize_with = "nullable")]
    names: Vec<String>,
}

impl Client {
    /// The image of this ID or name, if it is here.
    ///
    /// # Errors
    /// When Podman cannot be asked.
    pub async fn image(&self, id_or_name: &str) -> Result<Option<Image>> {
        let purpose = Purpose::new("inspect", format!("image {id_or_name}"));
        let path = format!("/images/{}/json", encode(id_or_name));
        let call = self.ask(purpose, &path);
        let image: InspectedImage = match self.socket.send(call, Upload::empty()).await {
            Ok(answer) => answer.json().await?,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error),
        };
        Ok(Some(Image {
            id: image.id,
            names: image.repo_tags,
            size: image.size,
            digest: image.digest,
            arch: image.architecture,
            labels: image.labels,
        }))
    }

    /// The image as a docker-archive (an uncompressed tar), as it comes. It carries no names: see
    /// [`Client::tag_image`].
    ///
    /// # Errors
    /// When the image is not here; in the stream, when Podman or the connection fails.
    pub async fn export_image(&self, id: &ImageId) -> Result<Chunks> {
        let purpose = Purpose::new("export", format!("image {}", id.short()));
        let api = self.api.clone();
        let image = id.to_string();
        let asked = purpose.clone();
        let stream = owning(|mut sender| async move {
            let image = api.images().get(image);
            let options = ImageExportOpts::builder()
                .format("docker-archive")
                .compress(false)
                .build();
            let mut chunks = image.export(&options);
            while let Some(chunk) = chunks.next().await {
                let chunk = chunk
                    .map(Bytes::from)
                    .map_err(|error| from_api(&asked, error));
                // Nobody reads on: the connection closes with `chunks`.
                if sender.send(chunk).await.is_err() {
                    return;
                }
            }
        });
        // The first piece tells whether there is an image; Podman packs it before it answers.
        let mut stream = stream.peekable();
        let wait = self.timeouts.image;
        let first = timeout(wait, std::pin::Pin::new(&mut stream).peek())
            .await
            .map_err(|_| purpose.timeout(wait))?;
        match first {
            Some(Ok(_)) => Ok(stalling(stream, purpose, self.timeouts.stall)),
            None => Err(purpose.malformed("the archive is empty")),
            Some(Err(_)) => match stream.try_next().await {
                Err(error) => Err(error),
                // Peeked at a moment ago.
                Ok(_) => Err(purpose.malformed("an error that went away")),
            },
        }
    }

    /// Takes an image from an archive that [`Client::export_image`] made, and returns what Podman
    /// calls it: its ID behind `sha256:` if the archive has no name in it.
    ///
    /// # Errors
    /// When Podman refuses the archive; [`super::Error::Archive`] if the stream fails.
    pub async fn load_image<S, E>(&self, archive: S) -> Result<Vec<String>>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let call = Call {
            purpose: Purpose::new("load", "an image"),
            method: Method::POST,
            path: "/images/load",
            query: Query::new(),
            wait: self.timeouts.image,
        };
        let answer = self.socket.send(call, Upload::archive(archive)).await?;
        Ok(answer.json::<Loaded>().await?.names)
    }

    /// Gives the image a name with a tag (`localhost/web:1`). If another image has that name, it
    /// loses it: ask [`Client::image`] for the name first.
    ///
    /// # Errors
    /// When the image is not here, or Podman refuses the name.
    pub async fn tag_image(&self, id: &ImageId, name: &str) -> Result<()> {
        let purpose = Purpose::new("name", format!("image {} {name}", id.short()));
        let (repository, tag) = split_name(name);
        let options = ImageTagOpts::builder().repo(repository).tag(tag).build();
        let image = self.api.images().get(id.as_str());
        self.api(&purpose, self.timeouts.answer, image.tag(&options))
            .await
    }

    /// Removes an image with all its names. Returns whether there was one.
    ///
    /// Never with Podman's `force`, which would remove the containers made from it as well.
    ///
    /// # Errors
    /// When a container uses the image, or Podman cannot be asked.
    pub async fn remove_image(&self, id: &ImageId) -> Result<bool> {
        let purpose = Purpose::new("remove", format!("image {}", id.short()));
        // By its ID Podman removes an image only if it has one name at most.
        let Some(image) = self.image(id.as_str()).await? else {
            return Ok(false);
        };
        let names = image.names.iter().map(String::as_str);
        let mut targets: Vec<&str> = names.skip(1).collect();
        targets.push(id.as_str());
        for target in targets {
            let image = self.api.images().get(target);
            match self
                .api(&purpose, self.timeouts.image, image.delete())
                .await
            {
                Ok(()) => {}
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

/// `host:5000/web` has no tag; `host:5000/web:1` has one.
fn split_name(name: &str) -> (&str, &str) {
    match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, tag),
        _ => (name, "latest"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_tag() {
        assert_eq!(split_name("localhost/web:1"), ("localhost/web", "1"));
        assert_eq!(split_name("localhost/web"), ("localhost/web", "latest"));
        assert_eq!(split_name("host:5000/web"), ("host:5000/web", "latest"));
        assert_eq!(split_name("host:5000/web:v2"), ("host:5000/web", "v2"));
    }

    /// As Podman 5.8.6 answered, shortened; an image of `podman import` has no labels.
    #[test]
    fn reads_an_image() {
        let image: InspectedImage = serde_json::from_str(
            r#"{"Id":"307566a855494837f6095294def4e8a91fb5afff276f1d814c6471b7e5b94860",
            "Digest":"sha256:5a116e1fb63b5eb8b029697fc5efb455a4ca43b66eabe475d3eedda4ef852c55",
            "RepoTags":["example.org/other:v2","localhost/multi:1"],"Architecture":"amd64","Os":"linux",
            "Size":2086077,"VirtualSize":2086077,"Labels":null,"Annotations":{}}"#,
        )
        .unwrap();
        assert_eq!(image.repo_tags.len(), 2);
        assert_eq!(image.size, 2_086_077);
    }
}
