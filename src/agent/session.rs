//! The destination's side of migrations: what the requests of a peer do.
//!
//! The states are drawn in [`protocol`](super::protocol). Each migration is one [`Session`] with a
//! journal of its own; requests for one migration run one after the other, those for different
//! migrations side by side.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_compression::tokio::bufread::ZstdDecoder;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt, TryStreamExt};
use hyper::{Method, Request, StatusCode};
use serde::Serialize;
use tokio_util::io::{ReaderStream, StreamReader};

use super::endings::Endings;
use super::memory::Memory;
use super::paths::Paths;
use super::protocol::{
    Assessment, Flows, Held, IMAGE_PIECE, MigrationId, Nothing, Offer, Prepare, Prepared, Running,
    Stage, Status, Undone,
};
use super::shell::Shell;
use super::{Body, Caller, Fingerprint, Handler, Peers, Permission, Refusal, Reply, reply};
use crate::bundle;
use crate::bundle::vetted::{Documents, Verdict, vetted};
use crate::conntrack::hold::{Hold, HoldSpec, Intake, Pace, Reserved, Side, To};
use crate::conntrack::{self, Flow, Gate, Protocol, Table};
use crate::criu::Freezer;
use crate::migration::{self, Effect, Hands, Journal, JournalError};
use crate::netlink::Namespace;
use crate::podman::{
    self, Client, Container, ContainerId, FailureLog, HostInfo, RestoreOptions, failure_log,
};
use crate::tunnel::{self, HopId};
use crate::{Class, Config, Error};

mod direct;

/// The largest container that is taken, in bytes: more memory than a host has.
const CONTAINER: u64 = 16 << 40;
/// How often the forsaken are looked for.
const LOOK_ROUND: Duration = Duration::from_secs(10);

/// How often, while migrations are coming, their sources are looked for among the known hosts.
const TRUST_ROUND: Duration = Duration::from_millis(500);

/// All migrations that are coming to this host.
#[derive(Debug)]
pub struct Sessions {
    config: Config,
    podman: Client,
    open: Mutex<HashMap<MigrationId, Shared>>,
    paths: Paths,
}

/// A migration and whose it is. One request at a time works on it.
#[derive(Debug, Clone)]
struct Shared {
    /// [`Peer::lasting`](super::Peer::lasting): its key may be replaced meanwhile.
    peer: Fingerprint,
    state: Arc<tokio::sync::Mutex<Session>>,
}

/// One migration that is coming to this host.
#[derive(Debug)]
struct Session {
    stage: Stage,
    offer: Offer,
    /// This host, as it was when the offer was assessed.
    host: Option<HostInfo>,
    hop: Option<HopId>,
    journal: Journal,
    heard_of: Instant,
    /// The hop by which connections of this container left this host: it comes home.
    away: Option<HopId>,
    /// What keeps their packets until the source lets go.
    hold: Option<Hold>,
    /// The container without its processes, with the direct engine.
    shell: Option<Shell>,
    /// Its memory, with the direct engine.
    memory: Option<Memory>,
    /// Whether memory is fetched when the container runs.
    post_copy: bool,
    /// Where the container's volumes are here, by name.
    volumes: BTreeMap<String, PathBuf>,
    /// The network namespace of the container that runs.
    namespace: Option<Namespace>,
    /// Where datagrams wait for the container, until the source has let go of all of them.
    intake: Option<Intake>,
    /// Podman was asked to restore the container and has not answered.
    unsure: bool,
    /// What was answered when the container ran.
    running: Option<Running>,
}

impl Sessions {
    /// The migrations coming to the host with this configuration: none so far.
    pub fn new(config: Config) -> Sessions {
        let podman = Client::with_timeouts(&config.podman_socket, config.podman);
        Sessions {
            paths: Paths::new(config.clone(), podman.clone()),
            config,
            podman,
            open: Mutex::default(),
        }
    }

    /// Tidies up after an agent that ended badly: what it had only prepared is undone.
    ///
    /// A container that runs stays: its source may have heard that it does, and only the source knows
    /// whether it is to stay for good. Returns a sentence about each.
    ///
    /// # Errors
    /// When a journal cannot be read, or Podman not be asked.
    pub async fn resume(&self) -> Result<Vec<String>, Error> {
        let mut told = Vec::new();
        for path in migration::left_behind(&self.config.incoming_dir())? {
            let journal = match Journal::open(&path) {
                // Another agent is at work on it.
                Err(JournalError::InUse { .. }) => continue,
                journal => journal?,
            };
            // Also one that has ended: this host may have crashed after the source let go of it.
            let ran = self.brought_by(&journal).await?.filter(|container| {
                !matches!(
                    container.status,
                    podman::Status::Created | podman::Status::Initialized
                )
            });
            let id = migration::number_of(&path);
            if journal.committed() {
                let_in(&journal).await?;
                let_memory_go(&journal)?;
                journal.close()?;
            } else if let Some(container) = ran {
                told.push(format!(
                    "migration {id} brought `{}`; its source has to say whether it stays",
                    container.name
                ));
            } else {
                let leftovers = self.unwind(&journal, Vec::new(), true).await;
                told.push(format!("migration {id} was interrupted and is undone"));
                told.extend(
                    leftovers
                        .iter()
                        .map(|leftover| format!("could not be undone: {leftover}")),
                );
                if leftovers.is_empty() {
                    journal.close()?;
                }
            }
        }
        Ok(told)
    }

    /// The container that a migration brought here, if it is there.
    async fn brought_by(&self, journal: &Journal) -> Result<Option<Container>, Error> {
        for container in journal.effects().iter().filter_map(Effect::restored) {
            match self.podman.inspect(container.as_str()).await {
                Ok(container) => return Ok(Some(container)),
                Err(error) if error.is_not_found() => {}
                // Podman has its name and no more, as after a removal that has failed half-way.
                Err(podman::Error::Refused { .. }) if !podman::remains::runs(container) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }

    /// Undoes what a journal names. `unsure`: Podman may still be at work on it.
    async fn unwind(&self, journal: &Journal, holds: Vec<Hold>, unsure: bool) -> Vec<String> {
        let mut hands = Hands::new(self.config.clone(), self.podman.clone());
        hands.holds = holds;
        hands.unsure = unsure;
        // Nothing that an incoming migration does is in doubt: there is nobody to ask.
        let leftovers = migration::unwind(&mut hands, journal, &mut |_event| {})
            .await
            .unwrap_or_default();
        leftovers.iter().map(ToString::to_string).collect()
    }

    /// The journal of a migration that an earlier agent of this host began.
    fn left_behind(&self, id: &MigrationId) -> Result<Option<Journal>, Error> {
        let path = self.config.incoming_dir().join(format!("{id}.jsonl"));
        Ok(path.exists().then(|| Journal::open(&path)).transpose()?)
    }

    /// Where a migration stands that an earlier agent of this host began.
    async fn stage_left_behind(&self, id: &MigrationId) -> Result<Stage, Error> {
        let Some(journal) = self.left_behind(id)? else {
            return Ok(Stage::Unknown);
        };
        let brought = self.brought_by(&journal).await?;
        Ok(match brought {
            Some(container) if container.is_running() => Stage::Running,
            _ => Stage::Prepared,
        })
    }

    /// For as long as the agent runs: undoes the migrations whose source has gone silent before
    /// anything runs here, and removes the hops that no connection uses any more.
    pub async fn look_after(self: Arc<Self>) {
        let mut round = tokio::time::interval(LOOK_ROUND);
        let mut trust = tokio::time::interval(TRUST_ROUND);
        let mut endings = Endings::default();
        loop {
            tokio::select! {
                _ = round.tick() => {}
                _ = trust.tick() => {
                    self.undo_of_strangers().await;
                    continue;
                }
                () = endings.next() => {}
            }
            match migration::leave_idle_hops(&self.config).await {
                Ok(hops_are_left) => endings.listen(hops_are_left),
                Err(error) => {
                    tracing::warn!(%error, "hops that nobody uses could not be removed");
                }
            }
            self.paths.look_after().await;
            for (id, session) in self.open() {
                // One that is at work is not forsaken.
                let Ok(mut session) = session.state.try_lock() else {
                    continue;
                };
                if session.stage == Stage::Prepared
                    && session.heard_of.elapsed() >= self.config.forsaken_timeout
                {
                    tracing::warn!(migration = %id, "its source has gone silent: undoing it");
                    if let Err(error) = self.undo(&id, &mut session).await {
                        tracing::error!(migration = %id, %error, "it could not be undone");
                    }
                }
            }
        }
    }

    /// Undoes what hosts have prepared that are not known any more. What runs stays: its source has
    /// let go of it, or may have.
    async fn undo_of_strangers(&self) {
        let open = self.open();
        if open.is_empty() {
            return;
        }
        let known = Peers::open(&self.config.state_dir, &self.config.limits).and_then(|p| p.list());
        let known = match known {
            Ok(known) => known,
            Err(error) => {
                tracing::warn!(%error, "it cannot be seen whether sources are still trusted");
                return;
            }
        };
        for (id, session) in open {
            if known.iter().any(|peer| peer.lasting() == session.peer) {
                continue;
            }
            // A request that is being worked on ends first.
            let Ok(mut session) = session.state.try_lock() else {
                continue;
            };
            if session.stage == Stage::Prepared {
                tracing::warn!(migration = %id, "its source is trusted no more: undoing it");
                if let Err(error) = self.undo(&id, &mut session).await {
                    tracing::error!(migration = %id, %error, "it could not be undone");
                }
            }
        }
    }

    /// The migrations that are coming at this moment.
    fn open(&self) -> Vec<(MigrationId, Shared)> {
        let sessions = self.sessions();
        let open = sessions.iter();
        open.map(|(id, session)| (id.clone(), session.clone()))
            .collect()
    }

    fn sessions(&self) -> MutexGuard<'_, HashMap<MigrationId, Shared>> {
        // Nothing in here can be left half-changed by a panic.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn answer(self: Arc<Self>, caller: Caller, request: Request<Body>) -> Reply {
        let (head, body) = request.into_parts();
        let path = head.uri.path().to_owned();
        let path: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        if let ["v1", "paths", id, verb] = path.as_slice() {
            let request = Request::from_parts(head, body);
            return self.paths.answer(&caller, id, verb, request).await;
        }
        if !caller.peer.may(Permission::Send) {
            return Err(Refusal::new(
                StatusCode::FORBIDDEN,
                "may-not-send",
                format!("{} may not send containers to this host", caller.peer.name),
            )
            .with_hint(format!(
                "if it is to: `livemig allow {} send` on the host that refused",
                caller.peer.name
            )));
        }
        match (&head.method, path.as_slice()) {
            (&Method::POST, ["v1", "assess"]) => {
                let offer: Offer = body.json().await?;
                said(self.assess(&offer).await)
            }
            (&Method::POST, ["v1", "migrations", id]) => {
                let id = number(id)?;
                let prepare: Prepare = body.json().await?;
                said(self.prepare(&caller, id, prepare).await)
            }
            (&Method::POST, ["v1", "migrations", id, "probe"]) => {
                let (_, session) = self.find(&caller, id)?;
                let mut session = session.lock().await;
                session.heard_of = Instant::now();
                said(self.probe(&session).await)
            }
            (&Method::PUT, ["v1", "migrations", id, "image"]) => {
                let (_, session) = self.find(&caller, id)?;
                let mut session = session.lock().await;
                let loaded = self.load_image(&mut session, body).await;
                session.heard_of = Instant::now();
                said(loaded)
            }
            (&Method::POST, ["v1", "migrations", id, "lazy"]) => {
                let (_, session) = self.find(&caller, id)?;
                let memory = direct::fetched(&mut *session.lock().await, body);
                memory.or_else(|error| said::<Nothing>(Err(error)))
            }
            (&Method::POST, ["v1", "migrations", id, "fetched"]) => {
                let (_, session) = self.find(&caller, id)?;
                said(direct::all_fetched(&mut *session.lock().await).await)
            }
            (&Method::PUT, ["v1", "migrations", id, part @ ..]) if direct::is_part(part) => {
                let (id, session) = self.find(&caller, id)?;
                let mut session = session.lock().await;
                let taken = self.take(&id, &mut session, part, body).await;
                session.heard_of = Instant::now();
                said(taken)
            }
            (&Method::POST, ["v1", "migrations", id, "hold"]) => {
                let (id, session) = self.find(&caller, id)?;
                said(self.hold(&id, &mut *session.lock().await).await)
            }
            (&Method::POST, ["v1", "migrations", id, "release"]) => {
                let (_, session) = self.find(&caller, id)?;
                said(self.release(&mut *session.lock().await).await)
            }
            (&Method::POST, ["v1", "migrations", id, "restore"]) => {
                let (id, session) = self.find(&caller, id)?;
                let mut session = session.lock().await;
                said(self.restore(&id, &mut session, body).await)
            }
            (&Method::POST, ["v1", "migrations", id, "commit"]) => {
                let id = number(id)?;
                match self.find(&caller, id.as_str()) {
                    Ok((id, session)) => said(self.commit(&id, &mut *session.lock().await).await),
                    // Told twice, it is committed once.
                    Err(_) => said(self.commit_left_behind(&id).await),
                }
            }
            (&Method::DELETE, ["v1", "migrations", id]) => {
                let id = number(id)?;
                match self.find(&caller, id.as_str()) {
                    Ok((id, session)) => said(self.undo(&id, &mut *session.lock().await).await),
                    Err(_) => said(self.undo_left_behind(&id).await),
                }
            }
            (&Method::DELETE, ["v1", "forwardings", container]) => {
                let peer = caller.peer.lasting().to_string();
                said(self.no_more_from(container, &peer).await)
            }
            (&Method::GET, ["v1", "migrations", id]) => {
                let id = number(id)?;
                let status = match self.find(&caller, id.as_str()) {
                    Ok((_, session)) => {
                        let session = session.lock().await;
                        Ok(Status {
                            stage: session.stage,
                            running: session.running.clone(),
                        })
                    }
                    Err(_) => self.stage_left_behind(&id).await.map(|stage| Status {
                        stage,
                        running: None,
                    }),
                };
                said(status)
            }
            _ => Err(Refusal::new(
                StatusCode::NOT_FOUND,
                "no-such-request",
                "the agent knows no such request",
            )),
        }
    }

    /// A host carries no more new connections of a container to here.
    async fn no_more_from(&self, container: &str, peer: &str) -> Result<Nothing, Error> {
        let container = container.parse()?;
        migration::no_more_from(&self.config, &container, peer).await?;
        Ok(Nothing {})
    }

    /// What stands in the way of a container, as seen from here. Changes nothing.
    async fn assess(&self, offer: &Offer) -> Result<Assessment, Error> {
        migration::at_destination(&self.podman, offer, &self.config).await
    }

    /// Brings up the hop and makes the networks that are missing.
    async fn prepare(
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
            hold: None,
            shell: None,
            memory: None,
            post_copy,
            volumes: BTreeMap::new(),
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
    fn room_for_one_more(&self) -> Result<(), Error> {
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
    async fn hold(&self, id: &MigrationId, session: &mut Session) -> Result<Held, Error> {
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
        hold.hold_all()?;
        session.hold = Some(hold);
        let hop = session.hop.ok_or(Error::OutOfOrder("hop"))?;
        let marked = migration::mark_end(&self.config, &addresses, hop, id).await?;
        Ok(Held { marked })
    }

    /// Lets go what was held: the source has let go of its own.
    async fn release(&self, session: &mut Session) -> Result<Nothing, Error> {
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
    async fn probe(&self, session: &Session) -> Result<Nothing, Error> {
        let hop = session.hop.ok_or(Error::OutOfOrder("hop"))?;
        migration::answer_verify(&self.config, hop).await?;
        Ok(Nothing {})
    }

    /// Takes the container's image.
    async fn load_image(&self, session: &mut Session, body: Body) -> Result<Nothing, Error> {
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
    async fn restore(
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
        let home = match session.away {
            Some(_) => migration::welcome(&addresses, &flows).await?,
            None => Vec::new(),
        };
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
        // Both run to their ends: what one of them has made is undone only when it is there.
        let (restored, intake) =
            futures::join!(self.podman.restore(archive, &options), start(intake));
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
    fn judged(
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

    /// The source has let go: from now on the container is this host's.
    async fn commit(&self, id: &MigrationId, session: &mut Session) -> Result<Nothing, Error> {
        if session.stage != Stage::Running {
            return Err(Error::OutOfOrder("running container"));
        }
        session.journal.commit()?;
        if let Some(shell) = session.shell.take() {
            // When this is answered the source removes its own.
            shell.persist(&session.volumes).await?;
            shell.recorded().await?;
        }
        // The source may not have been able to say so.
        self.release(session).await?;
        if let Some(intake) = session.intake.take() {
            let report = intake.finish().await?.clear().await?;
            tracing::debug!(migration = %id, ?report, "what came for the container was let in");
        }
        gate(&session.offer.container).remove().await?;
        let_memory_go(&session.journal)?;
        self.gather(&session.journal).await;
        self.close(id, session)?;
        // Hops that no connection needs would only be in the way. The source does not wait for that.
        let config = self.config.clone();
        tokio::spawn(async move {
            if let Err(error) = migration::leave_idle_hops(&config).await {
                tracing::warn!(%error, "hops that nobody uses could not be removed");
            }
        });
        Ok(Nothing {})
    }

    /// The same for a migration that an earlier agent of this host began, or that has been committed.
    async fn commit_left_behind(&self, id: &MigrationId) -> Result<Nothing, Error> {
        if let Some(journal) = self.left_behind(id)? {
            let_in(&journal).await?;
            let_memory_go(&journal)?;
            self.gather(&journal).await;
            journal.close()?;
        }
        Ok(Nothing {})
    }

    /// Brings the processes of what came together in its cgroup: see [`Freezer::gather`]. The container
    /// runs whether or not that succeeds.
    async fn gather(&self, journal: &Journal) {
        for container in journal.effects().iter().filter_map(Effect::restored) {
            let gathered = async {
                let pid = self.podman.inspect(container.as_str()).await?.pid;
                let pid = pid.ok_or(Error::OutOfOrder("process"))?;
                let root = Path::new("/");
                Ok::<_, Error>(Freezer::of(pid, root)?.gather(pid, root)?)
            };
            match gathered.await {
                Ok(0) => {}
                Ok(moved) => tracing::debug!(%container, moved, "gathered in its cgroup"),
                Err(error) => {
                    tracing::warn!(%container, %error, "processes of it may be outside of its cgroup");
                }
            }
        }
    }

    /// Undoes everything. An error means that the container may still be here.
    async fn undo(&self, id: &MigrationId, session: &mut Session) -> Result<Undone, Error> {
        if let Some(shell) = session.shell.take() {
            shell.abandon().await;
        }
        let holds = session.hold.take().into_iter();
        let holds = holds.chain(session.intake.take().map(Intake::into_hold));
        let leftovers = self
            .unwind(&session.journal, holds.collect(), session.unsure)
            .await;
        self.make_sure_it_is_gone(&session.journal, &leftovers)
            .await?;
        session.stage = Stage::Unknown;
        self.sessions().remove(id);
        if leftovers.is_empty() {
            session.journal.close()?;
        }
        Ok(Undone { leftovers })
    }

    /// The same for a migration that an earlier agent of this host began.
    async fn undo_left_behind(&self, id: &MigrationId) -> Result<Undone, Error> {
        let Some(journal) = self.left_behind(id)? else {
            return Ok(Undone {
                leftovers: Vec::new(),
            });
        };
        let leftovers = self.unwind(&journal, Vec::new(), true).await;
        self.make_sure_it_is_gone(&journal, &leftovers).await?;
        if leftovers.is_empty() {
            journal.close()?;
        }
        Ok(Undone { leftovers })
    }

    /// Whether a copy runs, or might yet. What Podman cannot remove (its disk is full) and nothing of which
    /// is alive is a left-over, and no reason for the source to keep its container frozen.
    async fn may_run(&self, container: &ContainerId, journal: &Journal) -> Result<bool, Error> {
        if podman::remains::runs(container) {
            return Ok(true);
        }
        if !self.podman.exists(container.as_str()).await? {
            return Ok(false);
        }
        if !podman::remains::would_be_seen()
            || podman::remains::restore_under_way(journal.written()?)
        {
            return Ok(true);
        }
        match self.podman.inspect(container.as_str()).await {
            Ok(container) => Ok(!matches!(
                container.status,
                podman::Status::Created
                    | podman::Status::Initialized
                    | podman::Status::Stopped
                    | podman::Status::Exited
                    | podman::Status::Removing
            )),
            // Podman has no more than its name.
            Err(podman::Error::NotFound { .. } | podman::Error::Refused { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The source will thaw its container when it is told that all is undone.
    async fn make_sure_it_is_gone(
        &self,
        journal: &Journal,
        leftovers: &[String],
    ) -> Result<(), Error> {
        for container in journal.effects().iter().filter_map(Effect::restored) {
            if self.may_run(container, journal).await? {
                return Err(Error::StillThere {
                    container: container.clone(),
                    reasons: leftovers.join("; "),
                });
            }
        }
        Ok(())
    }

    fn close(&self, id: &MigrationId, session: &mut Session) -> Result<(), Error> {
        session.journal.close()?;
        self.sessions().remove(id);
        Ok(())
    }

    /// The session of this migration, if it is this peer's.
    fn find(
        &self,
        caller: &Caller,
        id: &str,
    ) -> Result<(MigrationId, Arc<tokio::sync::Mutex<Session>>), Refusal> {
        let id = number(id)?;
        match self.sessions().get(&id) {
            // To everyone but its source a migration does not exist.
            Some(session) if session.peer == caller.peer.lasting() => {
                Ok((id, session.state.clone()))
            }
            _ => Err(Refusal::new(
                StatusCode::NOT_FOUND,
                "no-such-migration",
                format!("no migration {id} is under way here"),
            )),
        }
    }
}

impl Handler for Sessions {
    fn handle(
        self: Arc<Self>,
        caller: Caller,
        request: Request<Body>,
    ) -> BoxFuture<'static, Reply> {
        self.answer(caller, request).boxed()
    }
}

/// Removes the rules that keep packets from the container of an agent that has ended: by those of a hold
/// none wait any more, and it may have died after Podman had restored the container and before it could
/// open the gate.
async fn let_in(journal: &Journal) -> Result<(), Error> {
    for effect in journal.effects() {
        match effect {
            Effect::Hold { spec } => conntrack::hold::remove_rules(spec).await?,
            Effect::Closed { gate } => gate.remove().await?,
            _ => {}
        }
    }
    Ok(())
}

/// Removes the memory that the container has been restored from.
fn let_memory_go(journal: &Journal) -> Result<(), Error> {
    for effect in journal.effects() {
        if let Effect::Staging { directory } = effect {
            migration::remove_staging(directory)?;
        }
    }
    Ok(())
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
fn restored(container: &Container) -> Effect {
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
fn gate(container: &Container) -> Gate {
    Gate {
        container: container.id.clone(),
        addresses: container.addresses().collect(),
    }
}

pub(super) fn number(text: &str) -> Result<MigrationId, Refusal> {
    text.parse()
        .map_err(|error| Refusal::new(StatusCode::BAD_REQUEST, "bad-request", format!("{error}")))
}

/// An answer, or the refusal that an error is.
pub(super) fn said<T: Serialize>(result: Result<T, Error>) -> Reply {
    match result {
        Ok(answer) => reply::json(&answer),
        Err(error) => {
            let status = match error.class() {
                Class::Refused => StatusCode::CONFLICT,
                _ => StatusCode::INTERNAL_SERVER_ERROR,
            };
            let code = error.code().to_owned();
            let mut refusal = Refusal::new(status, code, crate::error::with_sources(&error));
            if let Some(hint) = error.hint() {
                refusal = refusal.with_hint(hint);
            }
            Err(refusal)
        }
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
