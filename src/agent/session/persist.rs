//! What is on this host's disk before its source hears that a container runs here, and forgets its own.

use super::super::protocol::{MigrationId, Stage};
use super::Sessions;
use crate::Error;
use crate::bundle;
use crate::migration::{Effect, Journal};

impl Sessions {
    /// Where a migration stands that an earlier agent of this host began.
    pub(super) async fn lasting_stage_left_behind(&self, id: &MigrationId) -> Result<Stage, Error> {
        let stage = self.stage_left_behind(id).await?;
        if stage == Stage::Running {
            let path = self.config.incoming_dir().join(format!("{id}.jsonl"));
            self.persist(&Journal::open(&path)?).await?;
        }
        Ok(stage)
    }

    /// Has the containers of a journal written to the disk: Podman writes out what it knows of them, and leaves
    /// to the kernel what they consist of.
    pub(super) async fn persist(&self, journal: &Journal) -> Result<(), Error> {
        let host = self.podman.host().await?;
        let mut trees = Vec::new();
        for effect in journal.effects() {
            if let Effect::Restored {
                container, volumes, ..
            } = effect
            {
                // Its root is on the same file system.
                trees.push(host.static_dir(container));
                for name in volumes {
                    let volume = self.podman.volume(name).await?;
                    trees.extend(volume.map(|volume| volume.mount_point));
                }
            }
        }
        Ok(bundle::persist(trees).await?)
    }
}
