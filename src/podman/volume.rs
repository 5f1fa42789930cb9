//! Named volumes.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use bytes::Bytes;
use futures::Stream;
use hyper::Method;
use podman_api::opts::VolumeCreateOpts;
use serde::{Deserialize, Serialize};

use super::client::Client;
use super::error::Result;
use super::id::check_name;
use super::inspect::nullable;
use super::request::{Call, Chunks, Purpose, Query, Upload};

/// A volume of a host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its name.
    #[serde(alias = "Name")]
    pub name: String,
    /// Its driver: `local` unless a plug-in keeps it.
    #[serde(alias = "Driver", default)]
    pub driver: String,
    /// Where its content is on the host; empty for a plug-in's that is not mounted. Not used to
    /// create one.
    #[serde(alias = "Mountpoint", default)]
    pub mount_point: PathBuf,
    /// What its driver was told, for example `type`, `device` and `o` of a mount.
    #[serde(alias = "Options", default, deserialize_with = "nullable")]
    pub options: BTreeMap<String, String>,
    /// Its labels.
    #[serde(alias = "Labels", default, deserialize_with = "nullable")]
    pub labels: BTreeMap<String, String>,
    /// Whether it was made without a name, for one container, and goes with it. The API cannot
    /// create one like that.
    #[serde(alias = "Anonymous", default)]
    pub anonymous: bool,
    /// The user who owns its root directory.
    #[serde(alias = "UID", default)]
    pub uid: u32,
    /// The group that does.
    #[serde(alias = "GID", default)]
    pub gid: u32,
}

impl Client {
    /// The volume of this name, if there is one.
    ///
    /// # Errors
    /// [`super::Error::Name`] if there can be none; else when Podman cannot be asked.
    pub async fn volume(&self, name: &str) -> Result<Option<Volume>> {
        check_name("volume", name)?;
        // podman-api has no field for `Anonymous`.
        let path = format!("/volumes/{name}/json");
        let call = self.ask(Purpose::new("inspect", format!("volume {name}")), &path);
        match self.socket.send(call, Upload::empty()).await {
            Ok(answer) => answer.json().await.map(Some),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All volumes of this host.
    ///
    /// # Errors
    /// When Podman cannot be asked.
    pub async fn volumes(&self) -> Result<Vec<Volume>> {
        let call = self.ask(Purpose::new("list", "volumes"), "/volumes/json");
        let answer = self.socket.send(call, Upload::empty()).await?;
        // null when there is none
        Ok(answer
            .json::<Option<Vec<Volume>>>()
            .await?
            .unwrap_or_default())
    }

    /// Whether there is a volume of this name.
    ///
    /// # Errors
    /// [`super::Error::Name`] if there can be none; else when Podman cannot be asked.
    pub async fn volume_exists(&self, name: &str) -> Result<bool> {
        check_name("volume", name)?;
        let purpose = Purpose::new("look for", format!("volume {name}"));
        let volume = self.api.volumes().get(name);
        self.api(&purpose, self.timeouts.answer, volume.exists())
            .await
    }

    /// Creates an empty volume with the name, driver, options and labels of this one.
    ///
    /// # Errors
    /// [`super::Refusal::VolumeExists`] if there is one of that name.
    pub async fn create_volume(&self, volume: &Volume) -> Result<()> {
        check_name("volume", &volume.name)?;
        let purpose = Purpose::new("create", format!("volume {}", volume.name));
        let to_map = |map: &BTreeMap<String, String>| -> HashMap<String, String> {
            map.clone().into_iter().collect()
        };
        let mut options = VolumeCreateOpts::builder()
            .name(&volume.name)
            .options(to_map(&volume.options))
            .labels(to_map(&volume.labels));
        if !volume.driver.is_empty() {
            options = options.driver(&volume.driver);
        }
        let options = options.build();
        let volumes = self.api.volumes();
        self.api(&purpose, self.timeouts.answer, volumes.create(&options))
            .await
            .map(drop)
    }

    /// Removes a volume and its content. Returns whether there was one.
    ///
    /// Never with Podman's `force`, which would remove the containers that use it as well.
    ///
    /// # Errors
    /// When a container uses it, or Podman cannot be asked.
    pub async fn remove_volume(&self, name: &str) -> Result<bool> {
        check_name("volume", name)?;
        let purpose = Purpose::new("remove", format!("volume {name}"));
        let volume = self.api.volumes().get(name);
        match self
            .api(&purpose, self.timeouts.image, volume.delete())
            .await
        {
            Ok(()) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The content of a volume as a tar, as it comes (Podman 5.6 or newer).
    ///
    /// # Errors
    /// When there is no such volume, or Podman is older (status 404 or 405 either way).
    pub async fn export_volume(&self, name: &str) -> Result<Chunks> {
        check_name("volume", name)?;
        let path = format!("/volumes/{name}/export");
        let mut call = self.ask(Purpose::new("export", format!("volume {name}")), &path);
        call.wait = self.timeouts.image;
        Ok(self.socket.send(call, Upload::empty()).await?.chunks())
    }

    /// Unpacks a tar into a volume that exists (Podman 5.6 or newer).
    ///
    /// # Errors
    /// As for [`Client::export_volume`]; [`super::Error::Archive`] if the stream fails. The volume may
    /// then hold a part of the archive.
    pub async fn import_volume<S, E>(&self, name: &str, archive: S) -> Result<()>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        check_name("volume", name)?;
        let path = format!("/volumes/{name}/import");
        let call = Call {
            purpose: Purpose::new("fill", format!("volume {name}")),
            method: Method::POST,
            path: &path,
            query: Query::new(),
            wait: self.timeouts.image,
        };
        self.socket
            .send(call, Upload::archive(archive))
            .await?
            .done()
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Podman 5.8.6 answered.
    #[test]
    fn reads_named_and_anonymous_volumes() {
        let named: Volume = serde_json::from_str(
            r#"{"Name":"vol1","Driver":"local","Mountpoint":"/var/lib/containers/storage/volumes/vol1/_data",
            "CreatedAt":"2026-11-22T20:22:22.931774486Z","Labels":{"v":"1"},"Scope":"local","Options":{},
            "MountCount":0,"NeedsCopyUp":true,"NeedsChown":true,"LockNumber":0}"#,
        )
        .unwrap();
        assert_eq!((named.name.as_str(), named.anonymous), ("vol1", false));
        assert_eq!(named.labels["v"], "1");
        let anonymous: Volume = serde_json::from_str(
            r#"{"Name":"7663f3d3827dc43b716b779a96ac53392a5b16ed0f786495980bd8b540bd0204","Driver":"local",
            "Mountpoint":"/v/_data","Labels":null,"Scope":"local","Options":null,"UID":100000,"GID":100000,
            "Anonymous":true,"MountCount":0}"#,
        )
        .unwrap();
        assert!(anonymous.anonymous);
        assert_eq!(anonymous.uid, 100_000);
        let json = serde_json::to_string(&anonymous).unwrap();
        assert_eq!(serde_json::from_str::<Volume>(&json).unwrap(), anonymous);
    }
}
