//! The destination's side of migrations: what the requests of a peer do.
//!
//! The states are drawn in [`protocol`](super::protocol). Each migration is one [`Session`] with a
//! journal of its own; requests for one migration run one after the other, those for different
//! migrations side by side. Here is which request does what; what that is follows in the order in which
//! they come: [`arrival`], with [`direct`] for what goes ahead, [`persist`], and [`end`]. Of migrations that an earlier
//! agent began there is only the journal: [`left_behind`].

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use futures::FutureExt;
use futures::future::BoxFuture;
use hyper::{Method, Request, StatusCode};
use serde::Serialize;
use tokio::task::JoinHandle;

use self::answers::Answers;
use super::memory::Memory;
use super::paths::Paths;
use super::protocol::{
    Assessment, Fetched, MigrationId, Nothing, Offer, Prepare, Running, Stage, Status,
};
use super::shell::Shell;
use super::{Body, Caller, Fingerprint, Handler, Permission, Refusal, Reply, reply};
use crate::conntrack::hold::{Hold, Intake};
use crate::migration::{self, Away, Journal};
use crate::netlink::Namespace;
use crate::podman::{Client, HostInfo};
use crate::tunnel::HopId;
use crate::{Class, Config, Error};

mod answers;
mod arrival;
mod direct;
mod end;
mod left_behind;
mod persist;

/// The largest container that is taken, in bytes: more memory than a host has.
const CONTAINER: u64 = 16 << 40;

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
    /// Which connections these are, once they wait here.
    connections: Option<JoinHandle<Result<Away, Error>>>,
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
    /// When it answers, with post-copy.
    answers: Option<Answers>,
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
                memory.or_else(|error| said::<Fetched>(Err(error)))
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
                        let lasting = match session.stage {
                            Stage::Running => self.persist(&session.journal).await,
                            _ => Ok(()),
                        };
                        lasting.map(|()| Status {
                            stage: session.stage,
                            running: session.running.clone(),
                        })
                    }
                    Err(_) => {
                        let stage = self.lasting_stage_left_behind(&id).await;
                        stage.map(|stage| Status {
                            stage,
                            running: None,
                        })
                    }
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
