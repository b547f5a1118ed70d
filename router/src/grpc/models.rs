//! ModelService and TokenizationService.

use std::sync::Arc;

use serde_json::Map;
use swallow_rpc::inference::v1::{
    self as wire, model_service_server::ModelService, tokenization_service_server::TokenizationService,
    tokenize_request,
};
use tonic::{Response, Status};

use super::{
    Services, parse,
    status::{code, plain},
};
use crate::{
    fleet::ModelEntry,
    generate::{Fault, Input, Invalid},
    metrics::Call,
};

const PREFIX: &str = "models/";
const PAGE_MAX: usize = 100;

impl Services {
    async fn described(&self, entry: &Arc<ModelEntry>) -> wire::Model {
        // Files that are not here yet, or give no text, are told by their absence.
        let text = self.door.text(entry).await.ok();
        wire::Model {
            name: format!("{PREFIX}{}", entry.name),
            aliases: entry.aliases.clone(),
            max_context_tokens: entry.max_model_len,
            vocab_size: entry.vocab_size,
            eos_token_ids: entry.eos_token_ids.clone(),
            bos_token_id: text.as_ref().and_then(|text| text.tokenizer.bos()),
            tokenizer_digest: text
                .as_ref()
                .map(|text| text.tokenizer_digest.clone())
                .unwrap_or_default(),
            chat_template_digest: text
                .as_ref()
                .map(|text| text.template_digest.clone())
                .unwrap_or_default(),
            ready_replicas: u32::try_from(entry.ready_replicas).unwrap_or(u32::MAX),
        }
    }

    async fn page(&self, request: wire::ListModelsRequest) -> Result<wire::ListModelsResponse, Fault> {
        let size = match usize::try_from(request.page_size) {
            Ok(0) => PAGE_MAX,
            Ok(size) => size.min(PAGE_MAX),
            Err(_) => return Err(Invalid::new("page_size", "must not be negative").into()),
        };
        // Models are only ever added at the end, so that a place among them stays.
        let from: usize = match request.page_token.as_str() {
            "" => 0,
            token => token
                .parse()
                .map_err(|_| Invalid::new("page_token", "is not one that a response gave"))?,
        };
        let entries = self.door.models();
        let mut models = Vec::new();
        for entry in entries.iter().skip(from).take(size) {
            models.push(self.described(entry).await);
        }
        let next = from.saturating_add(size);
        let next_page_token = if next < entries.len() {
            next.to_string()
        } else {
            String::new()
        };
        Ok(wire::ListModelsResponse {
            models,
            next_page_token,
        })
    }

    fn named(&self, name: &str) -> Result<Arc<ModelEntry>, Fault> {
        match name.strip_prefix(PREFIX) {
            Some(model) if !model.is_empty() => self.door.model(name),
            _ => Err(Invalid::new("name", "must be models/NAME").into()),
        }
    }

    async fn tokenized(
        &self,
        request: wire::TokenizeRequest,
        call: &mut Call,
    ) -> Result<wire::TokenizeResponse, Fault> {
        let input = match request.input {
            Some(tokenize_request::Input::Text(text)) => Input::Text {
                text,
                add_special: request.add_special_tokens.unwrap_or(true),
            },
            Some(tokenize_request::Input::Conversation(conversation)) => {
                if request.add_special_tokens == Some(true) {
                    let why = "is for a text; a conversation is what the chat template makes of it";
                    return Err(Invalid::new("add_special_tokens", why).into());
                }
                let tools = parse::tools(conversation.tools)?;
                let mut chat = parse::conversation(conversation.messages, Map::new(), false)?;
                tools.show(&mut chat);
                Input::Chat(chat)
            }
            None => return Err(Invalid::new("input", "is missing; give text or conversation").into()),
        };
        let entry = self.door.known(&request.model).await?;
        call.model(&entry.name);
        let text = self.door.text(&entry).await?;
        let ids = self.door.tokens(&entry, &text, input).await?;
        let tokens = Some(wire::TokenIds { ids });
        Ok(wire::TokenizeResponse {
            tokens,
            max_context_tokens: entry.max_model_len,
        })
    }

    async fn detokenized(
        &self,
        request: wire::DetokenizeRequest,
        call: &mut Call,
    ) -> Result<wire::DetokenizeResponse, Fault> {
        let entry = self.door.known(&request.model).await?;
        call.model(&entry.name);
        let text = self.door.text(&entry).await?;
        let ids = request.tokens.unwrap_or_default().ids;
        Ok(wire::DetokenizeResponse {
            text: text.tokenizer.decode(&ids, request.skip_special_tokens),
        })
    }
}

#[tonic::async_trait]
impl ModelService for Services {
    async fn list_models(
        &self,
        request: tonic::Request<wire::ListModelsRequest>,
    ) -> Result<Response<wire::ListModelsResponse>, Status> {
        self.page(request.into_inner())
            .await
            .map(Response::new)
            .map_err(|fault| plain(&fault))
    }

    async fn get_model(
        &self,
        request: tonic::Request<wire::GetModelRequest>,
    ) -> Result<Response<wire::GetModelResponse>, Status> {
        let entry = self
            .named(&request.get_ref().name)
            .map_err(|fault| plain(&fault))?;
        Ok(Response::new(wire::GetModelResponse {
            model: Some(self.described(&entry).await),
        }))
    }
}

#[tonic::async_trait]
impl TokenizationService for Services {
    async fn tokenize(
        &self,
        request: tonic::Request<wire::TokenizeRequest>,
    ) -> Result<Response<wire::TokenizeResponse>, Status> {
        let mut call = self.call("Tokenize");
        let outcome = self.tokenized(request.into_inner(), &mut call).await;
        call.ended(code(outcome.as_ref().map(|_| ())));
        outcome.map(Response::new).map_err(|fault| plain(&fault))
    }

    async fn detokenize(
        &self,
        request: tonic::Request<wire::DetokenizeRequest>,
    ) -> Result<Response<wire::DetokenizeResponse>, Status> {
        let mut call = self.call("Detokenize");
        let outcome = self.detokenized(request.into_inner(), &mut call).await;
        call.ended(code(outcome.as_ref().map(|_| ())));
        outcome.map(Response::new).map_err(|fault| plain(&fault))
    }
}
