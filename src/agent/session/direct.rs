//! What comes ahead of a container with the direct engine, part by part: its memory, the shell that it will
//! run in, its files.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use hyper::Response;
use tokio_util::io::{ReaderStream, StreamReader};

use super::super::memory::Memory;
use super::super::protocol::{Fetched, MigrationId, Nothing, Offer, Stage};
use super::super::shell::{Shell, fill};
use super::super::{Body, ReplyBody, reply};
use super::answers::Answers;
use super::arrival::restored;
use super::{CONTAINER, Session, Sessions};
use crate::Error;
use crate::bundle;
use crate::criu::pages::Layout;
use crate::criu::pages::fetch::fetch;
use crate::migration::Effect;
use crate::podman::{self, Mount, Volume};
use crate::runtime::{Rendezvous, Verb, setup};

/// Requests for memory wait for no more room than this, in bytes: that of a pipe (pipe(7)).
const ASKED: usize = 64 << 10;

/// Whether a request of this path brings a part of a container.
pub(super) fn is_part(path: &[&str]) -> bool {
    matches!(
        path,
        ["volumes" | "shell" | "files" | "standby" | "pages"] | ["rounds", _]
    )
}

/// Memory that is fetched when the container runs: what a request brings goes to CRIU, and what that wants
/// is the answer.
pub(super) fn fetched(session: &mut Session, body: Body) -> Result<Response<ReplyBody>, Error> {
    let shell = session.shell.as_mut().ok_or(Error::OutOfOrder("shell"))?;
    let layout = layout(&session.offer)?;
    let criu = shell.source()?;
    let moments = shell.moments().clone();
    let (asked, asks) = tokio::io::simplex(ASKED);
    tokio::spawn(async move {
        let pages = StreamReader::new(body.map_err(std::io::Error::other));
        let fetched = fetch(criu.into_split(), asks, pages, layout, &moments);
        if let Err(error) = fetched.await {
            tracing::warn!(%error, "memory does not come any more");
        }
    });
    Ok(reply::exchange(ReaderStream::new(asked)))
}

/// How the source's CRIU lays out what it says of pages.
fn layout(offer: &Offer) -> Result<Layout, Error> {
    let criu = offer.features.criu.as_ref();
    Ok(Layout::of(criu.ok_or(Error::OutOfOrder("CRIU"))?.version))
}

/// Says when all of the memory has been fetched.
pub(super) async fn all_fetched(session: &mut Session) -> Result<Fetched, Error> {
    let shell = session.shell.as_mut().ok_or(Error::OutOfOrder("shell"))?;
    shell.fetched().await?;
    let found = shell.moments().took();
    let seen = session
        .answers
        .take()
        .map(Answers::seen)
        .unwrap_or_default();
    Ok(Fetched {
        answered: seen.first.or(found),
        unread: seen.unread,
    })
}

impl Sessions {
    /// Takes a part of a container that still runs at its source, or stands frozen there.
    pub(super) async fn take(
        &self,
        id: &MigrationId,
        session: &mut Session,
        part: &[&str],
        body: Body,
    ) -> Result<Nothing, Error> {
        if session.stage != Stage::Prepared {
            return Err(Error::OutOfOrder("preparation"));
        }
        let (content, _) = bundle::receive(body, CONTAINER);
        let content = content.boxed();
        match part {
            ["rounds", number] => {
                let number = number.parse().map_err(|_| Error::OutOfOrder("number"))?;
                let memory = self.memory(id, session)?;
                memory.take_round(number, content).await?;
            }
            ["volumes"] => self.fill_volumes(session, content).await?,
            ["shell"] => self.make_shell(id, session, content).await?,
            ["files"] => {
                let shell = session.shell.as_ref().ok_or(Error::OutOfOrder("shell"))?;
                shell.bring_in(content, session.volumes.clone()).await?;
            }
            ["standby"] => {
                let memory = self.memory(id, session)?;
                let rest = memory.take_images(content).await?;
                // To its end, where it is known that all is as it was sent.
                rest.try_for_each(|_| std::future::ready(Ok(()))).await?;
                memory.no_more_rounds()?;
                let shell = session.shell.as_mut().ok_or(Error::OutOfOrder("shell"))?;
                shell.stand_by(&self.config).await?;
            }
            _ => self.memory(id, session)?.take_pages(content).await?,
        }
        Ok(Nothing {})
    }

    /// Where the memory of a container is kept that is coming.
    fn memory<'a>(
        &self,
        id: &MigrationId,
        session: &'a mut Session,
    ) -> Result<&'a mut Memory, Error> {
        if session.memory.is_none() {
            let layout = layout(&session.offer)?;
            let directory = self.config.memory_dir.join(format!("livemig-{id}"));
            session.journal.will([Effect::Staging {
                directory: directory.clone(),
            }])?;
            session.memory = Some(Memory::begin(directory, layout)?);
        }
        session.memory.as_mut().ok_or(Error::OutOfOrder("memory"))
    }

    /// Brings content into the container's volumes before Podman knows of the container: what it begins it
    /// waits for, and not for ever.
    async fn fill_volumes(
        &self,
        session: &mut Session,
        content: BoxStream<'static, bundle::Result<Bytes>>,
    ) -> Result<(), Error> {
        if session.shell.is_some() {
            return Err(Error::OutOfOrder("preparation"));
        }
        if session.volumes.is_empty() {
            self.make_volumes(session).await?;
        }
        fill(content, session.volumes.clone()).await
    }

    /// Makes the container's volumes, empty.
    async fn make_volumes(&self, session: &mut Session) -> Result<(), Error> {
        let container = &session.offer.container;
        let mut volumes = BTreeMap::new();
        for mount in &container.mounts {
            if let Mount::Volume { name, labels, .. } = mount {
                if self.podman.volume_exists(name).await? {
                    // Undone with the others, it would be lost.
                    return Err(Error::VolumeExists(name.clone()));
                }
                // Whatever else its driver was told is not for another host to say.
                let volume = Volume {
                    name: name.clone(),
                    labels: labels.clone(),
                    ..Volume::default()
                };
                volumes.insert(name.clone(), volume);
            }
        }
        session.journal.will([restored(container)])?;
        for (name, volume) in volumes {
            self.podman.create_volume(&volume).await?;
            let made = self.podman.volume(&name).await?;
            let made = made.ok_or(Error::OutOfOrder("volume"))?;
            session.volumes.insert(name, made.mount_point);
        }
        Ok(())
    }

    /// Has Podman make the container, all but its processes.
    async fn make_shell(
        &self,
        id: &MigrationId,
        session: &mut Session,
        archive: BoxStream<'static, bundle::Result<Bytes>>,
    ) -> Result<(), Error> {
        if session.shell.is_some() {
            return Err(Error::OutOfOrder("preparation"));
        }
        self.memory(id, session)?;
        let container = session.offer.container.clone();
        // With volumes it has been.
        if session.volumes.is_empty() {
            session.journal.will([restored(&container)])?;
        }
        let waiting = setup::waiting(&self.config);
        let rendezvous = Rendezvous::open(&waiting, Verb::Restore, &container.id)?;
        let (archive, verdict) = self.judged(session, archive)?;
        let memory = session.memory.as_ref().ok_or(Error::OutOfOrder("memory"))?;
        let made = Shell::make(
            &self.podman,
            archive,
            &rendezvous,
            memory,
            session.post_copy,
            &self.config,
        );
        match (made.await, verdict.reason()) {
            (Ok(shell), _) => session.shell = Some(shell),
            // Podman has not had all of it, and so has made nothing of it.
            (Err(_), Some(what)) => return Err(bundle::Error::Forbidden { what }.into()),
            (Err(error), None) => {
                session.unsure = !matches!(error, Error::Podman(podman::Error::Refused { .. }));
                return Err(error);
            }
        }
        for name in container.volumes() {
            let volume = self.podman.volume(name).await?;
            let volume = volume.ok_or(Error::OutOfOrder("volume"))?;
            let place: PathBuf = volume.mount_point;
            session.volumes.insert(name.to_owned(), place);
        }
        Ok(())
    }
}
