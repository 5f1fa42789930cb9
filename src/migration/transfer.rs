//! The state of the frozen container as one stream of bytes.
//!
//! First the flows, since they have to be in place before the container runs; then the changed files;
//! then Podman's archive as it comes. Nothing is collected in memory: what the destination cannot take
//! yet, Podman has not been asked for yet.

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;

use super::Migration;
use super::freeze::Frozen;
use crate::agent::protocol::Flows;
use crate::bundle::{self, Captured, Progress, splice};
use crate::{Error, Result};

/// The stream, ready to be sent.
pub(super) struct Stream {
    /// The bytes as they go over the wire.
    pub bytes: BoxStream<'static, Result<Bytes, bundle::Error>>,
    /// How many of them have gone.
    pub progress: Progress,
    /// What Podman's archive says of the dump, once it has gone by.
    pub captured: Option<Captured>,
}

pub(super) async fn transfer(migration: &mut Migration<'_>) -> Result<()> {
    let frozen = migration
        .frozen
        .take()
        .ok_or(Error::OutOfOrder("frozen container"))?;
    let header = Flows {
        flows: migration.flows.clone(),
    };
    let (content, captured) = match frozen {
        Frozen::Rest {
            checkpoint,
            changed,
        } => {
            let (spliced, captured) = bundle::spliced(changed, checkpoint, &[splice::STATS_DUMP]);
            (spliced.boxed(), Some(captured))
        }
        Frozen::Direct { images, changes } => (images.chain(changes.into_stream()).boxed(), None),
    };
    let (bytes, progress) = bundle::send(bundle::headed(&header, content)?);
    migration.stream = Some(Stream {
        bytes: bytes.boxed(),
        progress,
        captured,
    });
    Ok(())
}
