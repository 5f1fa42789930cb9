//! A container arrives: everything is made ready for it, it is taken, and brought to life.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use async_compression::tokio::bufread::ZstdDecoder;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use tokio_util::io::{ReaderStream, StreamReader};

use super::super::protocol::{
    Flows, Held, IMAGE_PIECE, MigrationId, Nothing, Prepare, Prepared, Running, Stage,
};
use super::super::{Body, Caller};
use super::answers::Answers;
use super::{CONTAINER, Session, Sessions, Shared};
use crate::Error;
use crate::bundle;
use crate::bundle::vetted::{Documents, Verdict, vetted};
use crate::conntrack::hold::{HoldSpec, Intake, Pace, Reserved, Side, To};
use crate::conntrack::{self, Flow, Gate, Protocol, Table};
use crate::criu::joining::Joining;
use crate::migration::{self, Away, Effect, Journal};
use crate::netlink::Namespace;
use crate::podman::{self, Container, ContainerId, FailureLog, RestoreOptions, failure_log};
use crate::tunnel;

impl Sessions {
    /// Brings up the hop and makes the networks that are missing.
    pub(super) async fn prepare(
        &self,
        caller: &Caller,
        id: MigrationId,
        prepare: Prepare,
    ) -> Result<Prepared, Error> {
        let Prepare {
            offer,
            hop,
            post_copy,
            forward,
        } = prepare;
        self.room_for_one_more()?;
        // From here on whoever wants it undone waits for this to end: a source that has crashed and
        // asks for that must not be told that there is nothing, and then there is.
        let journal = Journal::create(&self.config.incoming_dir(), &id)?;
        let state = Arc::new(tokio::sync::Mutex::new(Session {
            stage: Stage::Prepared,
            offer,
            host: None,
            hop: None,
            journal,
            heard_of: Instant::now(),
            away: None,
            connections: None,
            hold: None,
            shell: None,
            memory: None,
            post_copy,
            volumes: BTreeMap::new(),
            answers: None,
            namespace: None,
            intake: None,
            unsure: false,
            running: None,
        }));
        let mut session = state.clone().lock_owned().await;
        self.sessions().insert(
            id.clone(),
            Shared {
                peer: caller.peer.lasting(),
                state,
            },
        );
        let prepared = self
            .make_ready(caller, &id, &mut session, &hop, forward)
            .await;
        if prepared.is_err() {
            // What went wrong is the answer; what may be left of it stays in the journal.
            if let Err(error) = self.undo(&id, &mut session).await {
                tracing::error!(migration = %id, %error, "it could not be undone");
            }
        }
        prepared
    }

    /// Each has a share of this host's memory and disk, and of its packets that may wait.
    pub(super) fn room_for_one_more(&self) -> Result<(), Error> {
        let limit = self.config.incoming;
        if self.sessions().len() >= limit {
            return Err(Error::TooManyIncoming { limit });
        }
        Ok(())
    }

    async fn make_ready(
        &self,
        caller: &Caller,
        id: &MigrationId,
        session: &mut Session,
        theirs: &tunnel::Proposal,
        forward: bool,
    ) -> Result<Prepared, Error> {
        // It may have changed since the assessment, and the source may not have asked for one.
        let assessment = self.assess(&session.offer).await?;
        let name = &session.offer.container.name;
        migration::refuse(name, "this host", &assessment.findings)?;
        session.host = Some(assessment.host);
        for name in &assessment.networks_to_make {
            if let Some(network) = session
                .offer
                .networks
                .iter()
                .find(|network| network.name == *name)
            {
                session
                    .journal
                    .will([Effect::Network { name: name.clone() }])?;
                self.podman.create_network(network).await?;
            }
        }
        session.journal.will([Effect::Hop {
            user: id.as_str().to_owned(),
        }])?;
        let mtu = migration::mtu(&session.offer.networks);
        let peer = &caller.peer.lasting();
        let own = migration::open_hop(&self.config, peer, id.as_str(), mtu).await?;
        migration::connect_hop(&self.config, own.hop, theirs, caller.remote.ip()).await?;
        session.hop = Some(own.hop);
        let addresses: Vec<_> = session.offer.container.addresses().collect();
        session.away = migration::came_from_here(&addresses).await?;
        let gate = gate(&session.offer.container);
        if !gate.addresses.is_empty() {
            session
                .journal
                .will([Effect::Closed { gate: gate.clone() }])?;
            gate.close().await?;
        }
        if forward {
            let container = &session.offer.container;
            let after = migration::after_arrival(&self.config, container, own.hop)?;
            migration::change_forwarding(&self.config, &mut session.journal, Some(after)).await?;
        }
        Ok(Prepared {
            hop: own.proposal,
            home: session.away.is_some(),
        })
    }

    /// Holds what comes for the container on connections that began here.
    pub(super) async fn hold(
        &self,
        id: &MigrationId,
        session: &mut Session,
    ) -> Result<Held, Error> {
        if session.stage != Stage::Prepared || session.hold.is_some() {
            return Err(Error::OutOfOrder("preparation"));
        }
        let addresses: Vec<_> = session.offer.container.addresses().collect();
        let reserved = Reserved::first_free()?;
        let spec = HoldSpec {
            side: Side::Home,
            ..HoldSpec::new(reserved.queue(), addresses.clone())
        };
        session
            .journal
            .will([Effect::Hold { spec: spec.clone() }])?;
        let mut hold = reserved.prepare(spec).await?;
        let hop = session.hop.ok_or(Error::OutOfOrder("hop"))?;
        let by_this_hop = Away::of(&addresses).await?.all_by(hop);
        hold.hold_all()?;
        let began = Instant::now();
        session.hold = Some(hold);
        let marked = by_this_hop && migration::mark_end(&self.config, hop, id).await;
        // While the source takes the container's state.
        session.connections = Some(tokio::spawn(async move { Away::of(&addresses).await }));
        Ok(Held {
            marked,
            waited: began.elapsed(),
        })
    }

    /// Lets go what was held: the source has let go of its own.
    pub(super) async fn release(&self, session: &mut Session) -> Result<Nothing, Error> {
        if session.stage != Stage::Running {
            return Err(Error::OutOfOrder("running container"));
        }
        if let Some(hold) = session.hold.take() {
            let pace = match session.namespace.clone() {
                Some(namespace) => Pace::Sockets(namespace),
                None => return Err(Error::OutOfOrder("namespace")),
            };
            // The source does not wait until the last of many datagrams has been read.
            tokio::spawn(async move {
                let released = hold.release(To::Destination, pace).await;
                let cleared = match released {
                    Ok(released) => released.clear().await,
                    Err(error) => Err(error),
                };
                match cleared {
                    Ok(report) => {
                        tracing::debug!(?report, "what waited for a container that came home")
                    }
                    Err(error) => {
                        tracing::warn!(%error, "packets that waited here were not let go")
                    }
                }
            });
        }
        Ok(Nothing {})
    }

    /// Makes sure that packets of full size come through the hop, and sends some back.
    pub(super) async fn probe(&self, session: &Session) -> Result<Nothing, Error> {
        let hop = session.hop.ok_or(Error::OutOfOrder("hop"))?;
        migration::answer_verify(&self.config, hop).await?;
        Ok(Nothing {})
    }

    /// Takes the container's image.
    pub(super) async fn load_image(
        &self,
        session: &mut Session,
        body: Body,
    ) -> Result<Nothing, Error> {
        // It may have been undone while this request waited for its turn.
        if session.stage != Stage::Prepared {
            return Err(Error::OutOfOrder("preparation"));
        }
        let Some(image) = session.offer.container.image.clone() else {
            return Ok(Nothing {});
        };
        let name = session.offer.container.image_name.clone();
        if self.podman.image(image.as_str()).await?.is_none() {
            session
                .journal
                .will([Effect::Image { id: image.clone() }])?;
            let packed = StreamReader::new(body.map_err(std::io::Error::other));
            let plain = ReaderStream::with_capacity(ZstdDecoder::new(packed), IMAGE_PIECE);
            self.podman.load_image(plain).await?;
        } else {
            // It is here under another name: what is being sent is not needed.
            drop(body);
        }
        // An image that has no name at its source still needs the one that the container knows it by.
        if self
            .podman
            .image(&name)
            .await?
            .is_none_or(|found| found.id != image)
            && !name.is_empty()
        {
            self.podman.tag_image(&image, &name).await?;
        }
        Ok(Nothing {})
    }

    /// Enters the flows, and restores the container.
    pub(super) async fn restore(
        &self,
        id: &MigrationId,
        session: &mut Session,
        body: Body,
    ) -> Result<Running, Error> {
        if session.stage != Stage::Prepared {
            return Err(Error::OutOfOrder("preparation"));
        }
        session.stage = Stage::Restoring;
        let restored = self.bring_to_life(session, body).await;
        match restored {
            Ok(running) => {
                session.stage = Stage::Running;
                session.running = Some(running.clone());
                session.heard_of = Instant::now();
                tracing::info!(migration = %id, container = %session.offer.container.id, "the container runs");
                Ok(running)
            }
            Err(error) => {
                tracing::warn!(migration = %id, %error, "the container could not be restored: undoing it");
                match self.undo(id, session).await {
                    Ok(_) => Err(error),
                    // Something of it may run. The source has to ask again.
                    Err(worse) => Err(worse),
                }
            }
        }
    }

    async fn bring_to_life(&self, session: &mut Session, body: Body) -> Result<Running, Error> {
        let container = session.offer.container.clone();
        let hop = session.hop.ok_or(Error::OutOfOrder("hop"))?;
        let addresses: Vec<_> = container.addresses().collect();
        let came_home = session.away.map(|hop| Effect::CameHome {
            addresses: addresses.clone(),
            hop,
        });
        let (content, _) = bundle::receive(body, CONTAINER);
        let (Flows { flows }, archive) = bundle::beheaded(content).await?;
        let intake = hears_datagrams(&container, &flows)
            .then(Reserved::first_free)
            .transpose()?
            .map(|reserved| {
                let spec = HoldSpec {
                    packets: self.config.hold_packets,
                    bytes: self.config.hold_bytes,
                    side: Side::Arriving,
                    ..HoldSpec::new(reserved.queue(), addresses.clone())
                };
                (reserved, spec)
            });
        let mut effects: Vec<Effect> = came_home.into_iter().collect();
        effects.push(Effect::Flows {
            addresses: addresses.clone(),
            hop,
        });
        effects.extend(
            intake
                .iter()
                .map(|(_, spec)| Effect::Hold { spec: spec.clone() }),
        );
        if session.shell.is_none() {
            effects.push(restored(&container));
        }
        session.journal.will(effects)?;
        let began = Instant::now();
        let away = match (session.connections.take(), session.away) {
            (Some(reading), _) => reading
                .await
                .map_err(|_| Error::OutOfOrder("connections"))??,
            (None, Some(_)) => Away::of(&addresses).await?,
            (None, None) => Away::default(),
        };
        let home = away.welcome(&flows).await?;
        let table = Table::open(&Namespace::current()?)?;
        let arriving = flows.iter().enumerate();
        let entries = arriving
            // In order, as they were found.
            .filter(|(place, _)| home.binary_search(place).is_err())
            .map(|(_, flow)| flow.at_destination(hop))
            .collect();
        let mut inserted = 0;
        for result in table.insert_all(entries).await? {
            result?;
            inserted += 1;
        }
        let insert = began.elapsed();
        let ended = match &mut session.shell {
            Some(shell) => {
                let memory = session.memory.as_ref();
                let memory = memory.ok_or(Error::OutOfOrder("memory"))?;
                let changes = memory.take_images(archive).await?;
                shell.bring_in(changes, session.volumes.clone()).await?;
                let ended = Instant::now();
                // Both run to their ends: what one of them has made is undone only when it is there.
                let (restored, intake) = futures::join!(shell.restore(), start(intake));
                session.intake = intake?;
                session.namespace = Some(Namespace::of_pid(restored?)?);
                ended
            }
            None => {
                let ended = self.restore_by_podman(session, archive, intake).await?;
                session.namespace = Some(self.namespace_of(&container.id).await?);
                ended
            }
        };
        let namespace = session
            .namespace
            .clone()
            .ok_or(Error::OutOfOrder("namespace"))?;
        let runs = Instant::now();
        if container.networks.is_empty() {
            switch_on_loopback(&namespace).await?;
        }
        gate(&container).open().await?;
        if let Some(intake) = &session.intake {
            intake.open(&namespace);
        }
        if let Some(shell) = session.shell.as_ref().filter(|_| session.post_copy) {
            shell.moments().begin();
            session.answers = Some(Answers::watch(namespace, &flows));
        }
        // What was carried after it ends here again.
        let after = migration::at_home(&self.config, &container.id)?;
        migration::change_forwarding(&self.config, &mut session.journal, after).await?;
        Ok(Running {
            restore: ended.elapsed(),
            admit: runs.elapsed(),
            insert,
            flows: inserted,
            home,
        })
    }

    /// Has Podman make a container of an archive and restore it. Returns when all of the archive was
    /// there.
    async fn restore_by_podman(
        &self,
        session: &mut Session,
        archive: BoxStream<'static, bundle::Result<Bytes>>,
        intake: Option<(Reserved, HoldSpec)>,
    ) -> Result<Instant, Error> {
        let container = &session.offer.container;
        let options = RestoreOptions {
            tcp_established: true,
            file_locks: true,
            ..RestoreOptions::default()
        };
        let ended = Arc::new(Mutex::new(Instant::now()));
        let end = ended.clone();
        let (archive, verdict) = self.judged(session, archive)?;
        let archive = archive.inspect(move |_| {
            *end.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        });
        let joining = Joining::without_waiting();
        // Both run to their ends: what one of them has made is undone only when it is there.
        let (restored, intake) =
            futures::join!(self.podman.restore(archive, &options), start(intake));
        drop(joining);
        session.intake = intake?;
        if let (Err(_), Some(what)) = (&restored, verdict.reason()) {
            // Podman has not had all of it, and so has made nothing of it.
            return Err(bundle::Error::Forbidden { what }.into());
        }
        if let Err(error) = restored {
            session.unsure = !matches!(error, podman::Error::Refused { .. });
            let host = self.podman.host().await?;
            let reason = failure_log(&host.static_dir(&container.id), FailureLog::Restore);
            return Err(match reason {
                Some(reason) => Error::Restore {
                    source: Box::new(error.into()),
                    reason,
                },
                None => error.into(),
            });
        }
        let ended = *ended.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(ended)
    }

    /// An archive that fails if it is not of the container that was offered.
    pub(super) fn judged(
        &self,
        session: &Session,
        archive: BoxStream<'static, bundle::Result<Bytes>>,
    ) -> Result<(BoxStream<'static, bundle::Result<Bytes>>, Verdict), Error> {
        // Asked for then: now it would cost time in which the container is nowhere.
        let host = session.host.clone().ok_or(Error::OutOfOrder("host"))?;
        let agreement = (
            session.offer.container.clone(),
            self.config.arrivals.clone(),
            host,
        );
        let (archive, verdict) = vetted(archive, move |documents: &Documents| {
            let (container, policy, host) = &agreement;
            let agreed = migration::Agreed {
                container,
                policy,
                host,
            };
            agreed.judge(documents)
        });
        Ok((archive.boxed(), verdict))
    }

    /// The network namespace of a container that runs here.
    async fn namespace_of(&self, id: &ContainerId) -> Result<Namespace, Error> {
        let pid = self.podman.inspect(id.as_str()).await?.pid;
        Ok(Namespace::of_pid(pid.ok_or(Error::OutOfOrder("process"))?)?)
    }
}

/// CRIU makes the namespace of a container without networks anew and leaves its loopback interface off;
/// where there is a network, Podman has switched it on.
async fn switch_on_loopback(namespace: &Namespace) -> Result<(), Error> {
    let namespace = namespace.clone();
    tokio::task::spawn_blocking(move || tunnel::switch_on_loopback(&namespace))
        .await
        .unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

/// The container itself, as an effect.
pub(super) fn restored(container: &Container) -> Effect {
    Effect::Restored {
        container: container.id.clone(),
        volumes: container.volumes().map(str::to_owned).collect(),
        ports: container.ports.clone(),
    }
}

/// Whether datagrams may come for a container that is being restored. TCP needs no intake: what its
/// sockets cannot take, their peers do not send.
fn hears_datagrams(container: &Container, flows: &[Flow]) -> bool {
    let udp = |flow: &Flow| matches!(flow.seen.protocol, Protocol::Udp { .. });
    container.addresses().next().is_some()
        && (flows.iter().any(udp) || container.ports.iter().any(|port| port.protocol == "udp"))
}

async fn start(intake: Option<(Reserved, HoldSpec)>) -> conntrack::Result<Option<Intake>> {
    match intake {
        Some((reserved, spec)) => Ok(Some(Intake::start(reserved, spec).await?)),
        None => Ok(None),
    }
}

/// What keeps packets from a container until it is there.
pub(super) fn gate(container: &Container) -> Gate {
    Gate {
        container: container.id.clone(),
        addresses: container.addresses().collect(),
    }
}
