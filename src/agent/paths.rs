//! Paths that become shorter: the two ends of it.
//!
//! A container has moved from one host to the next, and connections that began at an *anchor* before
//! those two go from the anchor through the middle host to the container. They need not:
//!
//! ```text
//!  middle (the source of the migration)      anchor                      host of the container
//!    │ POST /v1/paths/ID/expect  Expect ─────────────────────────────────▶ remembers it
//!    │ POST /v1/paths/ID/shorten Shorten ────▶ │
//!    │                                         │ POST …/open   Open ─────▶ hop, both ways let in
//!    │                                         │ ◀─────────────── Opened
//!    │                                         │ POST …/probe ───────────▶ packets of full size come
//!    │                                      holds what goes to and comes from the container
//!    │                                         │ POST …/switch Switch ───▶ answers go to the anchor
//!    │                                      waits until the old path has run empty
//!    │                                      points its flows at the new hop, lets go
//!    │                                         │ POST …/end ─────────────▶ it stays
//!    │ ◀──────────────────────────── Shortened │
//!  forgets the flows
//! ```
//!
//! Nothing is lost or overtaken on the way, and a failure leaves the longer path: from `open` until a
//! minute after the end (at the host of the container: for as long as there is a hop) both ends let the container's known flows in by either hop
//! ([`steer::admit`]), so that every state in between works. Each side writes what it changes into a
//! journal first. The number of the change is known only to those whom the middle host told: whoever
//! comes with it, and is the anchor that was named, may take the flows that came by the middle host,
//! and no others.
//!
//! Anchor and host may never have heard of each other. Then the middle host introduces them, if both
//! have allowed it to ([`Permission::Introduce`]); else the path stays as long as it is.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hyper::{Method, Request, StatusCode};

use super::protocol::{
    Expect, Forget, Introduction, Nothing, Open, Opened, PathId, Shorten, Shortened, Switch,
    Switched,
};
use super::session::{number, said};
use super::{Body, Caller, Fingerprint, Peer, Peers};
use super::{Permission, Refusal, Reply};
use crate::conntrack::hold::{Hold, HoldSpec, Pace, Rate, Reserved, To};
use crate::conntrack::{Tuple, alias, steer};
use crate::migration::{self, Effect, End, Hands, Journal, ON_ITS_WAY};
use crate::podman::Client;
use crate::tunnel::HopId;
use crate::{Config, Error};

/// How many paths may be about to change at one time.
const LIMIT: usize = 1024;
/// How long to wait before asking again.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// The changes of paths that this host has a part in.
#[derive(Debug)]
pub(super) struct Paths {
    config: Config,
    podman: Client,
    expected: Mutex<HashMap<PathId, Shared>>,
}

/// A change at the host of the container, and whose it is.
#[derive(Debug, Clone)]
struct Shared {
    anchor: Fingerprint,
    since: Instant,
    state: Arc<tokio::sync::Mutex<Change>>,
}

/// A path that an anchor is about to shorten, at the host of the container.
#[derive(Debug)]
struct Change {
    addresses: Vec<IpAddr>,
    /// The hop by which the flows came so far.
    old: HopId,
    /// The hop to their anchor, and what was written down about it.
    new: Option<(HopId, Journal)>,
}

impl Paths {
    pub(super) fn new(config: Config, podman: Client) -> Paths {
        Paths {
            config,
            podman,
            expected: Mutex::default(),
        }
    }

    fn expected(&self) -> MutexGuard<'_, HashMap<PathId, Shared>> {
        // Nothing in here can be left half-changed by a panic.
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers the requests of a change.
    pub(super) async fn answer(
        &self,
        caller: &Caller,
        id: &str,
        verb: &str,
        request: Request<Body>,
    ) -> Reply {
        let (head, body) = request.into_parts();
        let id = number(id)?;
        match (&head.method, verb) {
            (&Method::POST, "expect") => said(self.expect(caller, id, body.json().await?).await),
            (&Method::POST, "shorten") => said(self.shorten(caller, id, body.json().await?).await),
            (&Method::POST, "forget") => said(self.forget(caller, body.json().await?).await),
            (&Method::POST, "open") => {
                let ask = body.json().await?;
                let change = self.find(caller, &id)?;
                said(self.open(caller, &id, &mut *change.lock().await, ask).await)
            }
            (&Method::POST, "probe") => {
                let change = self.find(caller, &id)?;
                let hop = change.lock().await.new.as_ref().map(|(hop, _)| *hop);
                said(self.probe(hop).await)
            }
            (&Method::POST, "switch") => {
                let ask = body.json().await?;
                let change = self.find(caller, &id)?;
                said(self.switch(&mut *change.lock().await, ask).await)
            }
            (&Method::POST, "end") => {
                let change = self.find(caller, &id)?;
                said(self.end(&id, &mut *change.lock().await).await)
            }
            (&Method::DELETE, "change") => match self.find(caller, &id) {
                Ok(change) => said(self.give_up(&id, &mut *change.lock().await).await),
                // Given up twice, or never begun.
                Err(_) => said(Ok(Nothing {})),
            },
            _ => Err(Refusal::new(
                StatusCode::NOT_FOUND,
                "no-such-request",
                "the agent knows no such request",
            )),
        }
    }

    /// The change of this number, if it is this caller's.
    fn find(
        &self,
        caller: &Caller,
        id: &PathId,
    ) -> Result<Arc<tokio::sync::Mutex<Change>>, Refusal> {
        match self.expected().get(id) {
            Some(shared) if shared.anchor == caller.peer.lasting() => Ok(shared.state.clone()),
            _ => Err(Refusal::new(
                StatusCode::NOT_FOUND,
                "no-such-path",
                format!("no change of a path with the number {id} is under way here"),
            )),
        }
    }

    /// Gives up the changes whose anchor has gone silent.
    pub(super) async fn look_after(&self) {
        let old: Vec<(PathId, Shared)> = {
            let expected = self.expected();
            let old = expected
                .iter()
                .filter(|(_, shared)| shared.since.elapsed() >= self.config.path_timeout);
            old.map(|(id, shared)| (id.clone(), shared.clone()))
                .collect()
        };
        for (id, shared) in old {
            // One that is at work is not forsaken.
            if let Ok(mut change) = shared.state.try_lock()
                && let Err(error) = self.give_up(&id, &mut change).await
            {
                tracing::error!(path = %id, %error, "a path stays between two states");
            }
        }
    }

    /// The middle host says that an anchor will come.
    async fn expect(&self, caller: &Caller, id: PathId, ask: Expect) -> Result<Nothing, Error> {
        let old = self.hop_to(&caller.peer)?;
        let anchor = self.known(&ask.anchor, &caller.peer)?;
        let change = Shared {
            anchor: anchor.lasting(),
            since: Instant::now(),
            state: Arc::new(tokio::sync::Mutex::new(Change {
                addresses: ask.addresses,
                old,
                new: None,
            })),
        };
        let mut expected = self.expected();
        if expected.len() >= LIMIT {
            return Err(Error::TooManyPaths { limit: LIMIT });
        }
        expected.entry(id).or_insert(change);
        Ok(Nothing {})
    }

    /// The anchor opens a hop to here.
    async fn open(
        &self,
        caller: &Caller,
        id: &PathId,
        change: &mut Change,
        ask: Open,
    ) -> Result<Opened, Error> {
        if change.new.is_some() {
            return Err(Error::OutOfOrder("path"));
        }
        let mut journal = Journal::create(&self.config.incoming_dir(), id)?;
        journal.will([Effect::Hop {
            user: id.as_str().to_owned(),
        }])?;
        let peer = &caller.peer.lasting();
        let made = async {
            let own = migration::open_hop(&self.config, peer, id.as_str(), ask.hop.mtu).await?;
            let address = caller.remote.ip();
            migration::connect_hop(&self.config, own.hop, &ask.hop, address).await?;
            journal.will([Effect::Path {
                end: End::Container,
                addresses: change.addresses.clone(),
                from: change.old,
                to: own.hop,
            }])?;
            for hop in [change.old, own.hop] {
                steer::admit(hop, &change.addresses)?;
            }
            if let Some(container) = &ask.forwards {
                let after = migration::admitted(&self.config, container, change.old, own.hop)?;
                migration::change_forwarding(&self.config, &mut journal, after).await?;
            }
            Ok(own)
        };
        match made.await {
            Ok(own) => {
                change.new = Some((own.hop, journal));
                Ok(Opened { hop: own.proposal })
            }
            Err(error) => {
                self.unwind(&journal, None).await;
                self.expected().remove(id);
                Err(error)
            }
        }
    }

    async fn probe(&self, hop: Option<HopId>) -> Result<Nothing, Error> {
        migration::answer_verify(&self.config, hop.ok_or(Error::OutOfOrder("hop"))?).await?;
        Ok(Nothing {})
    }

    /// The answers on these flows go to the anchor from here on.
    async fn switch(&self, change: &mut Change, ask: Switch) -> Result<Switched, Error> {
        let (new, _) = change.new.as_ref().ok_or(Error::OutOfOrder("hop"))?;
        let theirs: HashSet<Tuple> = ask.flows.into_iter().collect();
        let flows = migration::flows_of(&change.addresses).await?;
        // Nothing but what came by the host that named this anchor; and again, if the answer was lost.
        let marks: Vec<_> = flows
            .iter()
            .filter(|flow| [Some(change.old), Some(*new)].contains(&flow.came_by()))
            .filter(|flow| theirs.contains(&flow.seen))
            .map(|flow| flow.answering(*new))
            .collect();
        let switched = Switched { flows: marks.len() };
        migration::mark_all(marks).await?;
        Ok(switched)
    }

    /// The anchor has done its part.
    async fn end(&self, id: &PathId, change: &mut Change) -> Result<Nothing, Error> {
        let (_, journal) = change.new.as_mut().ok_or(Error::OutOfOrder("hop"))?;
        journal.commit()?;
        journal.close()?;
        self.expected().remove(id);
        // The old hop goes on admitting these flows for as long as it lives: should the anchor never
        // hear this answer, it takes the longer way again.
        Ok(Nothing {})
    }

    /// All is to be as it was.
    async fn give_up(&self, id: &PathId, change: &mut Change) -> Result<Nothing, Error> {
        self.expected().remove(id);
        if let Some((new, journal)) = change.new.take() {
            if let Some(left) = self.unwind(&journal, None).await.first() {
                return Err(Error::PathLeft(left.clone()));
            }
            journal.close()?;
            self.dismiss_later(new, change.addresses.clone());
        }
        Ok(Nothing {})
    }

    /// At the anchor: sends the container's flows straight to the host that it is on now.
    async fn shorten(&self, caller: &Caller, id: PathId, ask: Shorten) -> Result<Shortened, Error> {
        let old = self.hop_to(&caller.peer)?;
        let mut flows = migration::flows_of(&ask.addresses).await?;
        flows.retain(|flow| flow.goes_by() == Some(old));
        let forwarding = migration::forwarding_of(&self.config, &ask.container)?;
        let forwards = forwarding
            .and_then(|forwarding| forwarding.to)
            .is_some_and(|onward| onward.hop == old);
        if flows.is_empty() && !forwards {
            return Ok(Shortened { flows: 0 });
        }
        let host = self.known(&ask.to, &caller.peer)?;
        let mut journal = Journal::create(&self.config.incoming_dir(), &id)?;
        journal.will([Effect::Hop {
            user: id.as_str().to_owned(),
        }])?;
        let mut short_cut = ShortCut {
            config: &self.config,
            id: &id,
            ask: &ask,
            old,
            forwards,
            journal,
            held: None,
        };
        let done = short_cut.take(&host).await;
        let ShortCut {
            mut journal, held, ..
        } = short_cut;
        match done {
            Ok(shortened) => {
                journal.commit()?;
                journal.close()?;
                self.dismiss_later(old, ask.addresses);
                Ok(shortened)
            }
            Err(error) => {
                if self.unwind(&journal, held).await.is_empty() {
                    journal.close()?;
                }
                Err(error)
            }
        }
    }

    /// In the middle of a path that nothing takes any more.
    async fn forget(&self, caller: &Caller, ask: Forget) -> Result<Nothing, Error> {
        let hop = self.hop_to(&caller.peer)?;
        let theirs: HashSet<Tuple> = ask.flows.into_iter().collect();
        let mut flows = migration::flows_of(&ask.addresses).await?;
        flows.retain(|flow| flow.goes_by() == Some(hop) && theirs.contains(&flow.seen));
        migration::forget(&flows).await?;
        Ok(Nothing {})
    }

    async fn unwind(&self, journal: &Journal, hold: Option<Hold>) -> Vec<String> {
        let mut hands = Hands::new(self.config.clone(), self.podman.clone());
        // Whichever way it came, what waits is from the one container that there is.
        if let Some(hold) = hold
            && let Err(error) = hold.release(To::Destination, Pace::Unpaced).await
        {
            tracing::warn!(%error, "packets that were held for a shorter path are lost");
        }
        match migration::unwind(&mut hands, journal, &mut |_event| {}).await {
            Ok(leftovers) => leftovers.iter().map(ToString::to_string).collect(),
            Err(peer) => vec![format!("{peer} does not answer")],
        }
    }

    /// After a while nothing is on the other path any more, and nobody asks again.
    fn dismiss_later(&self, hop: HopId, addresses: Vec<IpAddr>) {
        let after = self.config.path_timeout;
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            if let Err(error) = steer::dismiss(hop, &addresses) {
                tracing::warn!(%hop, %error, "a hop still admits a container's flows");
            }
        });
    }

    /// The hop to a peer.
    fn hop_to(&self, peer: &Peer) -> Result<HopId, Error> {
        let hop = migration::tunnels(&self.config)
            .registry()
            .find(&peer.lasting().to_string())?;
        hop.map(|hop| hop.spec.hop)
            .ok_or_else(|| Error::NoHop(peer.name.to_string()))
    }

    /// The host that `introducer` speaks of, as it is known here; or from now on.
    fn known(&self, host: &Introduction, introducer: &Peer) -> Result<Peer, Error> {
        let peers = Peers::open(&self.config.state_dir, &self.config.limits)?;
        if let Some(mut known) = peers.by_fingerprint(host.fingerprint)? {
            known.address.get_or_insert(host.address.clone());
            return Ok(known);
        }
        if !introducer.may(Permission::Introduce) {
            return Err(Error::NotIntroduced {
                host: host.name.to_string(),
                introducer: introducer.name.to_string(),
            });
        }
        let mut peer = Peer::new(
            host.name.clone(),
            Some(host.address.clone()),
            host.fingerprint,
        );
        if peers.find(&peer.name)?.is_some() {
            // Its key tells it apart from the other of that name.
            let key = host.fingerprint.to_string();
            let short: String = key.chars().filter(char::is_ascii_alphanumeric).collect();
            let short = short.to_ascii_lowercase();
            let short = short.trim_start_matches("sha256");
            peer.name = format!("{}.{}", host.name, short.get(..8).unwrap_or(short)).parse()?;
        }
        // It may share paths, and nothing else.
        peer.may.clear();
        tracing::info!(name = %peer.name, introducer = %introducer.name, "a host was introduced");
        Ok(peers.add(&peer)?)
    }
}

/// What an anchor does to send a container's flows straight to the host that it is on now.
struct ShortCut<'a> {
    config: &'a Config,
    id: &'a PathId,
    ask: &'a Shorten,
    /// The hop that the flows took so far.
    old: HopId,
    /// Whether new connections take it, too.
    forwards: bool,
    journal: Journal,
    held: Option<Hold>,
}

impl ShortCut<'_> {
    async fn take(&mut self, host: &Peer) -> Result<Shortened, Error> {
        let config = self.config;
        let (id, ask, old) = (self.id, self.ask, self.old);
        let addresses = &ask.addresses;
        let mut connection = migration::connect(config, host).await?;
        let mtu = migration::tunnels(config)
            .registry()
            .get(old)?
            .and_then(|hop| Some(hop.proposal?.mtu))
            .ok_or(Error::OutOfOrder("hop"))?;
        let own = migration::open_hop(config, &host.lasting(), id.as_str(), mtu).await?;
        let new = own.hop;
        self.journal.will([Effect::PathAsked {
            peer: host.name.to_string(),
            path: id.clone(),
        }])?;
        let open = Open {
            forwards: self.forwards.then(|| ask.container.clone()),
            hop: own.proposal,
        };
        let Opened { hop } = connection
            .call(Method::POST, &format!("/v1/paths/{id}/open"), &open)
            .await?;
        migration::connect_hop(config, new, &hop, connection.peer_addr().ip()).await?;
        let probe = format!("/v1/paths/{id}/probe");
        migration::verify_hop(config, new, &mut connection, &probe).await?;

        // First, so that no new one begins on the longer way after the others were counted.
        let after = migration::redirected(config, &ask.container, old, new)?;
        migration::change_forwarding(config, &mut self.journal, after).await?;
        let reserved = Reserved::first_free()?;
        let spec = HoldSpec {
            hop: Some(new),
            ..HoldSpec::new(reserved.queue(), addresses.clone())
        };
        self.journal.will([
            Effect::Path {
                end: End::Anchor,
                addresses: addresses.clone(),
                from: old,
                to: new,
            },
            Effect::Hold { spec: spec.clone() },
        ])?;
        for hop in [old, new] {
            steer::admit(hop, addresses)?;
        }
        self.held.insert(reserved.prepare(spec).await?).hold_all()?;
        // Those that began since are meant as well.
        let mut flows = migration::flows_of(addresses).await?;
        flows.retain(|flow| flow.goes_by() == Some(old));
        // Some of their peers may be the host of the container, or have an address that it has too.
        alias::Peers::of(&flows, &[]).remember()?;
        let switch = Switch {
            flows: flows.iter().map(|flow| flow.seen).collect(),
        };
        let Switched { flows: switched } = connection
            .call(Method::POST, &format!("/v1/paths/{id}/switch"), &switch)
            .await?;
        // What is still on the longer path comes first.
        tokio::time::sleep(ON_ITS_WAY).await;
        let steered = flows.iter().map(|flow| flow.steered(Some(new)));
        migration::mark_all(steered.collect()).await?;
        if let Some(hold) = self.held.take() {
            let released = hold.release(To::Destination, Pace::Rate(Rate::default()));
            let report = released.await?.clear().await?;
            tracing::debug!(path = %id, ?report, "held for a shorter path");
        }
        self.end_there(host).await?;
        Ok(Shortened { flows: switched })
    }

    /// Tells the host of the container that it is done. Only its own word says that it has not given
    /// up, so it is asked again if the answer is lost.
    async fn end_there(&self, host: &Peer) -> Result<(), Error> {
        let (began, id) = (Instant::now(), self.id);
        loop {
            let asked = async {
                let mut connection = migration::connect(self.config, host).await?;
                let path = format!("/v1/paths/{id}/end");
                let Nothing {} = connection.call(Method::POST, &path, &Nothing {}).await?;
                Ok::<_, Error>(())
            };
            match asked.await {
                Ok(()) => return Ok(()),
                Err(error @ Error::Agent(super::Error::Refused { .. })) => return Err(error),
                Err(error) if began.elapsed() >= self.config.path_end_timeout => return Err(error),
                Err(error) => tracing::debug!(%error, path = %id, "no answer yet; asking again"),
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }
}
