//! HTTP as the endpoint speaks it: who gets the token, which answers are worth another try, and what the others mean.
//!
//! Redirects are followed here and not by the HTTP library, because the token may go to the endpoint's own scheme,
//! host and port alone: large files are redirected to other hosts, renamed repositories to the same one.

use std::{fs, path::Path, time::Duration};

use swallow_proto::launch::FetchArgs;
use ureq::{
    Agent, Body,
    http::{Response, StatusCode, Uri, header},
};

use super::{Event, FetchError, Report, shown, trust::tls, wait_before};
use crate::checkpoint::one_line;

/// How long to wait for the endpoint, and how often to try again.
#[derive(Clone, Debug)]
pub struct Patience {
    /// Tries after the first one, in a row without progress.
    pub retries: u32,
    /// The wait before the second try; it doubles from try to try.
    pub first_wait: Duration,
    /// For a connection.
    pub connect: Duration,
    /// Without a byte.
    pub stall: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience {
            retries: 3,
            first_wait: Duration::from_secs(1),
            connect: Duration::from_secs(15),
            stall: Duration::from_secs(60),
        }
    }
}

/// Speaks with one endpoint.
pub(super) struct Client {
    agent: Agent,
    /// Without a slash at the end.
    endpoint: String,
    origin: Origin,
    token: Option<String>,
    pub(super) patience: Patience,
}

/// Why a try gave nothing.
pub(super) enum Trouble {
    /// Another try may succeed, after that wait if the endpoint named one.
    Passing(String, Option<Duration>),
    /// No other try will.
    Final(FetchError),
}

/// Scheme, host and port.
#[derive(Debug, PartialEq, Eq)]
struct Origin(String, String, u16);

impl Origin {
    fn of(uri: &Uri) -> Option<Origin> {
        let scheme = uri.scheme_str()?.to_ascii_lowercase();
        let default_port = match scheme.as_str() {
            "https" => 443,
            "http" => 80,
            _ => return None,
        };
        let host = uri.host().filter(|host| !host.is_empty())?.to_ascii_lowercase();
        Some(Origin(scheme, host, uri.port_u16().unwrap_or(default_port)))
    }

    fn is_secure(&self) -> bool {
        self.0 == "https"
    }
}

const REDIRECTS_MOST: usize = 10;

impl Client {
    pub(super) fn new(args: &FetchArgs, patience: Patience) -> Result<Client, FetchError> {
        let endpoint = &args.endpoint;
        let bad = || FetchError::Argument {
            flag: "endpoint",
            expected: "an http:// or https:// address without user name, query and fragment",
            found: format!("{endpoint:?}"),
        };
        let endpoint = endpoint.trim_end_matches('/');
        let uri: Uri = endpoint.parse().map_err(|_| bad())?;
        let origin = Origin::of(&uri).ok_or_else(bad)?;
        let has_user = uri
            .authority()
            .is_some_and(|authority| authority.as_str().contains('@'));
        if has_user || endpoint.contains(['?', '#']) {
            return Err(bad());
        }
        let agent = Agent::config_builder()
            .user_agent(concat!("swallow-worker/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(patience.connect))
            .timeout_recv_response(Some(patience.stall))
            .timeout_per_read(Some(patience.stall))
            .tls_config(tls(args.ca_file.as_deref())?)
            .build()
            .new_agent();
        let token = args.token_file.as_deref().map(read_token).transpose()?;
        Ok(Client {
            agent,
            endpoint: endpoint.to_owned(),
            origin,
            token,
            patience,
        })
    }

    /// The address of `path`, which begins with a slash, at the endpoint.
    pub(super) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.endpoint)
    }

    /// One try: the answer's status is 200, 206 or 416. `from` is the first byte wanted; 0 asks for all.
    pub(super) fn get(&self, url: &str, from: u64) -> Result<Response<Body>, Trouble> {
        let mut at: Uri = url
            .parse()
            .map_err(|_| final_answer(url, "a valid address", url))?;
        for _ in 0..=REDIRECTS_MOST {
            let response = self.send(&at, from)?;
            let status = response.status();
            if !matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) {
                return self.judge(url, response);
            }
            let next = response
                .headers()
                .get(header::LOCATION)
                .and_then(|value| value.to_str().ok());
            let next = next.and_then(|location| resolve(&at, location)).ok_or_else(|| {
                final_answer(
                    url,
                    "a redirect to an http address",
                    format!("HTTP {status} without one"),
                )
            })?;
            let is_secure = |uri: &Uri| Origin::of(uri).is_some_and(|origin| origin.is_secure());
            if is_secure(&at) && !is_secure(&next) {
                let found = format!("one to {}", one_line(&next.to_string()));
                return Err(final_answer(url, "no redirect from https to http", found));
            }
            at = next;
        }
        Err(final_answer(
            url,
            format!("at most {REDIRECTS_MOST} redirects"),
            "more",
        ))
    }

    fn send(&self, at: &Uri, from: u64) -> Result<Response<Body>, Trouble> {
        let mut request = self.agent.get(at);
        if let Some(token) = &self.token
            && Origin::of(at).as_ref() == Some(&self.origin)
        {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        request.call().map_err(|error| match untrusted(&error) {
            Some(reason) => Trouble::Final(FetchError::Certificate {
                url: one_line(&at.to_string()),
                reason: one_line(&reason.to_string()),
            }),
            None => Trouble::Passing(one_line(&error.to_string()), None),
        })
    }

    fn judge(&self, url: &str, response: Response<Body>) -> Result<Response<Body>, Trouble> {
        let status = response.status();
        let text = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let said = text("x-error-message")
            .map(|words| format!(", {}", one_line(words)))
            .unwrap_or_default();
        let url = one_line(url);
        Err(Trouble::Final(match status.as_u16() {
            200 | 206 | 416 => return Ok(response),
            401 => FetchError::Unauthorized { url, said },
            403 => FetchError::Forbidden { url, said },
            404 => FetchError::NotFound { url, said },
            408 | 429 | 500..=599 => {
                let wait = text("retry-after").and_then(|wait| wait.trim().parse().ok());
                return Err(Trouble::Passing(
                    format!("HTTP {status}{said}"),
                    wait.map(Duration::from_secs),
                ));
            }
            _ => {
                let found = format!("HTTP {status}{said}");
                FetchError::Answer {
                    url,
                    expected: format!("HTTP {}", StatusCode::OK),
                    found,
                }
            }
        }))
    }

    /// A whole answer of at most `limit` bytes, with as many tries as patience has.
    pub(super) fn get_whole(
        &self,
        url: &str,
        limit: u64,
        report: &mut dyn Report,
    ) -> Result<Vec<u8>, FetchError> {
        let mut failures = 0;
        loop {
            let body = self.get(url, 0).and_then(|mut response| {
                let body = response.body_mut().with_config().limit(limit).read_to_vec();
                body.map_err(|error| match error {
                    ureq::Error::BodyExceedsLimit(_) => {
                        final_answer(url, format!("at most {limit} bytes"), "a longer answer")
                    }
                    error => Trouble::Passing(one_line(&error.to_string()), None),
                })
            });
            match body {
                Ok(body) => return Ok(body),
                Err(trouble) => self.pause(url, &mut failures, trouble, report)?,
            }
        }
    }

    /// Counts a failure and waits before the next try; an error when there is none.
    pub(super) fn pause(
        &self,
        url: &str,
        failures: &mut u32,
        trouble: Trouble,
        report: &mut dyn Report,
    ) -> Result<(), FetchError> {
        let (reason, asked) = match trouble {
            Trouble::Final(error) => return Err(error),
            Trouble::Passing(reason, asked) => (reason, asked),
        };
        *failures += 1;
        if *failures > self.patience.retries {
            return Err(FetchError::GaveUp {
                url: one_line(url),
                tries: *failures,
                reason,
            });
        }
        let wait = wait_before(*failures, &self.patience, asked);
        report.event(&Event::Retry {
            url: one_line(url),
            reason,
            wait,
        });
        std::thread::sleep(wait);
        Ok(())
    }
}

/// A certificate's fault, which another try would meet again.
fn untrusted(error: &ureq::Error) -> Option<&rustls::Error> {
    let tls = match error {
        ureq::Error::Rustls(tls) => tls,
        ureq::Error::Io(io) => io.get_ref()?.downcast_ref()?,
        _ => return None,
    };
    matches!(tls, rustls::Error::InvalidCertificate(_)).then_some(tls)
}

fn final_answer(url: &str, expected: impl Into<String>, found: impl Into<String>) -> Trouble {
    Trouble::Final(FetchError::Answer {
        url: one_line(url),
        expected: expected.into(),
        found: found.into(),
    })
}

/// The address that a redirect at `base` to `location` means.
fn resolve(base: &Uri, location: &str) -> Option<Uri> {
    let location = location.split('#').next().unwrap_or_default();
    let (scheme, authority) = (base.scheme_str()?, base.authority()?);
    let absolute = if location.starts_with("http://") || location.starts_with("https://") {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}")
    };
    let uri: Uri = absolute.parse().ok()?;
    Origin::of(&uri).map(|_| uri)
}

fn read_token(path: &Path) -> Result<String, FetchError> {
    let advice = "--token-file must name a readable file with one token";
    let text = fs::read_to_string(path).map_err(|source| FetchError::Local {
        path: shown(path),
        source,
        advice,
    })?;
    let token = text.trim();
    if token.is_empty() || !token.chars().all(|c| c.is_ascii_graphic()) {
        // The file's content is a secret, even a malformed one.
        let found = format!("something else in {}", shown(path));
        return Err(FetchError::Argument {
            flag: "token-file",
            expected: "a file with one token",
            found,
        });
    }
    Ok(token.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().expect("a test's own address")
    }

    #[test]
    fn redirects_resolve_against_the_address_they_came_from() {
        let base = uri("https://hub.example:8443/mirror/org/name/resolve/c/f.bin?x=1");
        for (location, expected) in [
            ("https://cdn.example/a?b=c#d", Some("https://cdn.example/a?b=c")),
            ("//cdn.example/a", Some("https://cdn.example/a")),
            ("/other/place", Some("https://hub.example:8443/other/place")),
            (
                "g.bin",
                Some("https://hub.example:8443/mirror/org/name/resolve/c/g.bin"),
            ),
            ("https://", None),
            ("http://bad host/", None),
        ] {
            let resolved = resolve(&base, location).map(|uri| uri.to_string());
            assert_eq!(resolved.as_deref(), expected, "{location}");
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let origin = |text| Origin::of(&uri(text)).expect("an http address");
        assert_eq!(
            origin("https://Hub.example/a"),
            origin("https://hub.example:443/b")
        );
        assert_ne!(origin("https://hub.example"), origin("http://hub.example"));
        assert_ne!(origin("http://hub.example:1"), origin("http://hub.example:2"));
        assert_eq!(Origin::of(&uri("ftp://hub.example/")), None);
    }
}
