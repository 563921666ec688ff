//! Talks to a running `qlora serve` with async-openai, and fails where an answer is not what that client's types expect.
//!
//! ```sh
//! qlora serve --model M --adapter NAME=DIR --port 8000
//! cargo run --release --manifest-path benches/peers/async-openai/Cargo.toml -- http://127.0.0.1:8000/v1 [MODEL] [KEY]
//! ```
//!
//! Requests and answers go through the client's own types. What the model says does not matter, except that it must be
//! the same in every form. Calls are asked for where the model's template writes tools.

use std::error::Error;

use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::error::OpenAIError;
use async_openai::types::chat::{
    ChatCompletionMessageToolCalls, CreateChatCompletionRequest, CreateChatCompletionResponse, FinishReason,
};
use async_openai::types::completions::CreateCompletionRequest;
use futures::StreamExt;
use serde_json::{Value, json};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

struct Check {
    client: Client<OpenAIConfig>,
    model: String,
}

impl Check {
    /// A greedy question, with further fields.
    fn question(&self, further: Value) -> Outcome<CreateChatCompletionRequest> {
        let mut body = json!({
            "model": self.model,
            "messages": [{ "role": "user", "content": "What is the capital of France?" }],
            "temperature": 0,
            "max_completion_tokens": 16,
        });
        let further = further.as_object().cloned().unwrap_or_default();
        body.as_object_mut().ok_or("an object")?.extend(further);
        Ok(serde_json::from_value(body)?)
    }

    async fn ask(&self, further: Value) -> Outcome<CreateChatCompletionResponse> {
        Ok(self.client.chat().create(self.question(further)?).await?)
    }

    async fn chat_and_stream(&self) -> Outcome {
        let whole = self.ask(json!({})).await?;
        let text = whole.choices[0].message.content.clone().ok_or("a content")?;
        let usage = whole.usage.ok_or("a usage")?;
        assert!(usage.completion_tokens <= 16 && usage.total_tokens > usage.prompt_tokens);
        println!("chat: {text:?}");

        let streamed = self.question(json!({ "stream_options": { "include_usage": true } }))?;
        let mut chunks = self.client.chat().create_stream(streamed).await?;
        let (mut pieces, mut finish, mut total) = (String::new(), None, None);
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk?;
            for choice in &chunk.choices {
                pieces += choice.delta.content.as_deref().unwrap_or_default();
                finish = choice.finish_reason.or(finish);
            }
            total = chunk.usage.map(|usage| usage.total_tokens).or(total);
        }
        assert_eq!((pieces, finish, total), (text, whole.choices[0].finish_reason, Some(usage.total_tokens)));
        Ok(())
    }

    async fn logprobs(&self) -> Outcome {
        let answer = self.ask(json!({ "logprobs": true, "top_logprobs": 3 })).await?;
        let choice = &answer.choices[0];
        let tokens = choice.logprobs.as_ref().and_then(|logprobs| logprobs.content.as_ref()).ok_or("logprobs")?;
        // Greedy: each token is the likeliest.
        assert!(!tokens.is_empty());
        assert!(
            tokens.iter().all(|token| token.top_logprobs.len() == 3 && token.logprob == token.top_logprobs[0].logprob)
        );
        println!("logprobs: {} tokens", tokens.len());
        Ok(())
    }

    async fn schema(&self) -> Outcome {
        let schema = json!({
            "type": "object",
            "properties": {
                "name": { "type": "string", "maxLength": 8 },
                "age": { "type": "integer", "minimum": 0, "maximum": 150 },
            },
            "required": ["name", "age"],
            "additionalProperties": false,
        });
        let form =
            json!({ "type": "json_schema", "json_schema": { "name": "person", "schema": schema, "strict": true } });
        let answer = self.ask(json!({ "response_format": form, "max_completion_tokens": 96 })).await?;
        let choice = &answer.choices[0];
        assert_eq!(choice.finish_reason, Some(FinishReason::Stop), "{choice:?}");
        let person: Value = serde_json::from_str(choice.message.content.as_deref().ok_or("a content")?)?;
        assert!(person["name"].is_string() && person["age"].as_u64().is_some_and(|age| age <= 150), "{person}");
        println!("schema: {person}");
        Ok(())
    }

    /// A call, and what comes after its result.
    async fn tools(&self) -> Outcome {
        let parameters = json!({
            "type": "object",
            "properties": { "city": { "type": "string", "enum": ["Paris", "Rome"] } },
            "required": ["city"],
            "additionalProperties": false,
        });
        let tool = json!({ "type": "function", "function": { "name": "weather", "parameters": parameters } });
        let choice = json!({ "type": "function", "function": { "name": "weather" } });
        let further = json!({ "tools": [tool], "tool_choice": choice, "max_completion_tokens": 64 });
        let answer = match self.ask(further).await {
            Ok(answer) => answer,
            Err(error) => return without_tools(error),
        };
        let message = &answer.choices[0].message;
        assert_eq!(answer.choices[0].finish_reason, Some(FinishReason::ToolCalls), "{message:?}");
        let calls = message.tool_calls.as_deref().ok_or("calls")?;
        let [ChatCompletionMessageToolCalls::Function(call)] = calls else { return Err(format!("{calls:?}").into()) };
        let arguments: Value = serde_json::from_str(&call.function.arguments)?;
        assert!(call.function.name == "weather" && arguments["city"].is_string(), "{call:?}");
        println!("tools: {}({arguments})", call.function.name);

        let messages = json!([
            { "role": "user", "content": "How is the weather?" },
            { "role": "assistant", "tool_calls": [{ "id": call.id, "type": "function",
                "function": { "name": call.function.name, "arguments": call.function.arguments } }] },
            { "role": "tool", "tool_call_id": call.id, "content": "It rains." },
        ]);
        let answer = self.ask(json!({ "tools": [tool], "messages": messages })).await?;
        assert!(answer.usage.is_some_and(|usage| usage.completion_tokens > 0));
        Ok(())
    }

    async fn completions(&self) -> Outcome {
        let body = json!({ "model": self.model, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0, "logprobs": 1 });
        let request: CreateCompletionRequest = serde_json::from_value(body)?;
        let whole = self.client.completions().create(request.clone()).await?;
        let mut chunks = self.client.completions().create_stream(request).await?;
        let mut text = String::new();
        while let Some(chunk) = chunks.next().await {
            text += &chunk?.choices.into_iter().map(|choice| choice.text).collect::<String>();
        }
        assert_eq!(text, whole.choices[0].text);
        println!("completion: {text:?}");
        Ok(())
    }

    /// Errors come with OpenAI's fields, as the client reads them.
    async fn errors(&self) -> Outcome {
        for (further, status, param) in [
            (json!({ "model": "nobody" }), 404, "model"),
            (json!({ "temperature": -1 }), 400, "temperature"),
            (json!({ "messages": [] }), 400, "messages"),
            (json!({ "top_logprobs": 3 }), 400, "top_logprobs"),
        ] {
            match self.client.chat().create(self.question(further.clone())?).await {
                Err(OpenAIError::ApiError(error)) => {
                    assert_eq!(
                        (error.status_code.as_u16(), error.api_error.param.as_deref()),
                        (status, Some(param)),
                        "{error}"
                    );
                }
                other => return Err(format!("{further}: {other:?}").into()),
            }
        }
        let streamed = self.question(json!({ "model": "nobody" }))?;
        let refused = match self.client.chat().create_stream(streamed).await {
            Err(_) => true,
            Ok(mut chunks) => chunks.next().await.is_some_and(|chunk| chunk.is_err()),
        };
        assert!(refused, "a stream of nobody's");
        println!("errors: as they should be");
        Ok(())
    }
}

/// A template that writes no tools refuses them, by the field's name.
fn without_tools(error: Box<dyn Error>) -> Outcome {
    match error.downcast_ref::<OpenAIError>() {
        Some(OpenAIError::ApiError(refused)) if refused.api_error.param.as_deref() == Some("tools") => {
            println!("tools: refused, {}", refused.api_error.message);
            Ok(())
        }
        _ => Err(error),
    }
}

#[tokio::main]
async fn main() -> Outcome {
    let mut args = std::env::args().skip(1);
    let url = args.next().unwrap_or_else(|| "http://127.0.0.1:8000/v1".into());
    let (model, key) = (args.next(), args.next().unwrap_or_else(|| "none".into()));
    let client = Client::with_config(OpenAIConfig::new().with_api_base(url).with_api_key(key));
    let models = client.models().list().await?;
    let names: Vec<&str> = models.data.iter().map(|model| model.id.as_str()).collect();
    println!("models: {}", names.join(", "));
    let last = names.last().ok_or("no model")?.to_string();
    let check = Check { client, model: model.unwrap_or(last) };
    assert_eq!(check.client.models().retrieve(&check.model).await?.id, check.model);
    check.chat_and_stream().await?;
    check.logprobs().await?;
    check.schema().await?;
    check.tools().await?;
    check.completions().await?;
    check.errors().await?;
    println!("done");
    Ok(())
}
